"""Two forwards before one backward: each has its own route, its own gates and its own penalty."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cram.attach import detach
from cram.model.attached import AttachedModel
from cram.routing.query import Route
from tests.cram.factories import PROJECTION, QUESTIONS, expert_weights, image, prompt, routed_llava
from tests.cram.model.checkpointing import MODES, enable_checkpointing

# torch says this of the vision tower, whose frozen layers are checkpointed along with the language model's.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


def prepared(mode: dict[str, bool] | None) -> tuple[Any, list[Any], AttachedModel]:
    """A model in training with a penalty, and two batches with different pictures and questions."""
    model, processor, cram = routed_llava(trained=True, sigma=1.5)
    if mode is not None:
        enable_checkpointing(model, mode)
    cram.method.prepare_penalty()
    batches = []
    for first in (0, 3):
        texts = [prompt(QUESTIONS[0], 1, f"answer {first + i}") for i in range(2)]
        pictures = [image(first), image(first + 1)]
        batch = processor(text=texts, images=pictures, padding=True, return_tensors="pt")
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batches.append(batch)
    return model.train(), batches, cram


def gradients(cram: AttachedModel) -> list[Tensor]:
    """Takes the gradients of all trained parameters, the centroid's included."""
    found = []
    for parameter in cram.trainable_parameters():
        assert parameter.grad is not None
        found.append(parameter.grad)
        parameter.grad = None
    return found


@pytest.mark.parametrize("mode", [None, *MODES], ids=["plain", "non_reentrant", "reentrant"])
def test_two_forwards_and_then_both_backwards_equal_separate_steps(mode: dict[str, bool] | None) -> None:
    model, batches, cram = prepared(mode)
    separate: list[list[Tensor]] = []
    for batch in batches:
        (model(**batch).loss + cram.method.penalty(cram.state)).backward()
        separate.append(gradients(cram))
    assert not torch.allclose(separate[0][0], separate[1][0])
    losses, states = [], []
    for batch in batches:
        losses.append(model(**batch).loss)
        states.append(cram.state)
    assert states[0] is not states[1]
    penalties = [cram.method.penalty(state) for state in states]
    assert not torch.equal(*penalties)
    for loss, penalty in zip(losses, penalties, strict=True):
        (loss + penalty).backward()
    for found, first, second in zip(gradients(cram), *separate, strict=True):
        torch.testing.assert_close(found, first + second, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("mode", [None, *MODES], ids=["plain", "non_reentrant", "reentrant"])
def test_prompts_between_forward_and_backward_change_no_gradient(mode: dict[str, bool] | None) -> None:
    model, (batch, other), cram = prepared(mode)
    (model(**batch).loss + cram.method.penalty(cram.state)).backward()
    expected = gradients(cram)
    loss, state = model(**batch).loss, cram.state
    loss = loss + cram.method.penalty(state)
    del state
    with torch.no_grad():
        for _ in range(3):
            model.eval()(**other)
    model.train()
    loss.backward()
    for found, wanted in zip(gradients(cram), expected, strict=True):
        assert torch.equal(found, wanted)


class Nested:
    """A layer's hook asks the same model another question."""

    def __init__(self) -> None:
        self.model, self.processor, _ = routed_llava()
        self.batches = [
            self.processor(text=[prompt(QUESTIONS[i], 1)], images=[image(i)], return_tensors="pt")
            for i in range(2)
        ]
        self.language = self.model.model.language_model

    def outer(self, ask: Callable[[], Any]) -> Tensor:
        """The logits of the first question; `ask` is called once behind the first layer."""
        asked: list[bool] = []

        def hook(*_: Any) -> None:
            if not asked:
                asked.append(True)
                ask()

        handle = self.language.layers[0].register_forward_hook(hook)
        try:
            return self.model(**self.batches[0]).logits
        finally:
            handle.remove()

    def inner(self) -> Tensor:
        """The logits of the other question."""
        return self.model(**self.batches[1]).logits

    def refused(self) -> None:
        """A forward that its own hooks refuse: it routes another number of samples."""
        gates = torch.ones(len(self.language.layers), 3, self.model.cram.num_experts)
        with self.model.cram.fixed(Route(gates)), pytest.raises(ValueError, match="rows of a forward"):
            self.inner()

    def raised(self) -> None:
        """A forward that fails behind its first layer."""
        handle = self.language.layers[1].register_forward_pre_hook(_fail)
        with pytest.raises(ArithmeticError):
            self.inner()
        handle.remove()


def _fail(*_: Any) -> None:
    raise ArithmeticError("of a test")


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("ask", [Nested.inner, Nested.refused, Nested.raised])
def test_a_forward_within_a_forward_leaves_the_outer_one_its_route(
    ask: Callable[[Nested], Any], gradients: bool
) -> None:
    nested = Nested()
    with torch.set_grad_enabled(gradients):
        expected, other = nested.model(**nested.batches[0]).logits, nested.inner()
        assert not torch.equal(other[0, -1], expected[0, -1])
        assert torch.equal(nested.outer(lambda: ask(nested)), expected)
        assert torch.equal(nested.inner(), other)


def test_the_state_is_that_of_the_running_forward() -> None:
    nested, seen = Nested(), []
    with torch.no_grad():
        nested.inner()
        before = nested.model.cram.state
        nested.outer(lambda: seen.append(nested.model.cram.state))
    assert seen == [nested.model.cram.state] and seen[0] is not before


def test_an_inner_forward_that_never_began_is_not_overlooked() -> None:
    """A hook in front of all others ends it; its end must not take the outer one's route unseen."""
    nested = Nested()

    def ask() -> None:
        handle = nested.language.register_forward_pre_hook(_fail, prepend=True)
        with pytest.raises(ArithmeticError):
            nested.inner()
        handle.remove()

    with torch.no_grad():
        expected = nested.inner()
        with pytest.raises(RuntimeError, match="a forward inside of another one must begin in its hooks"):
            nested.outer(ask)
        assert torch.equal(nested.inner(), expected)


def test_a_forward_that_was_interrupted_leaves_later_ones_their_states() -> None:
    nested = Nested()
    handle = nested.language.layers[1].register_forward_pre_hook(_interrupt)
    with torch.no_grad():
        with pytest.raises(KeyboardInterrupt):
            nested.inner()
        handle.remove()
        nested.inner()
        first = nested.model.cram.state
        nested.model(**nested.batches[0])
    assert first.route is not None and nested.model.cram.state is not first
    assert not torch.equal(first.route.gates, nested.model.cram.state.route.gates)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_blocks_are_hooked_only_once_gradients_are_wanted() -> None:
    nested = Nested()
    blocks = [layer.self_attn for layer in nested.language.layers]
    with torch.no_grad():
        nested.inner()
    assert not any(block._forward_pre_hooks for block in blocks)
    for _ in range(2):
        nested.inner()
    assert [len(block._forward_pre_hooks) for block in blocks] == [1] * len(blocks)
    with torch.no_grad():
        nested.inner()
    detach(nested.model)
    assert not any(block._forward_pre_hooks for block in blocks)


def test_the_penalty_of_a_forward_does_not_depend_on_later_ones() -> None:
    model, batches, cram = prepared(None)
    model(**batches[0])
    state = cram.state
    before = cram.method.penalty(state)
    model(**batches[1])
    assert torch.equal(cram.method.penalty(state), before)
    assert not torch.equal(cram.method.penalty(cram.state), before)


def test_replaced_experts_get_bases_of_their_own() -> None:
    _, _, cram = prepared(None)
    old = cram.method._penalty._bases
    cram.method.freeze()
    cram.set_experts((), (), 0)
    for index, name in enumerate(("old", "other", "new")):
        weights = expert_weights(cram, 10 + index)
        cram.method.add_expert(name, weights, index % 2, torch.zeros(PROJECTION), trained=index == 2)
    cram.method.prepare_penalty()
    for before, after, module in zip(old, cram.method._penalty._bases, cram.modules.values(), strict=True):
        ((_, b),) = module.factors([0])
        torch.testing.assert_close(after @ (after.mT @ b), b, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(before @ (before.mT @ b), b, atol=1e-2)


def test_each_thread_reads_its_own_state() -> None:
    _, _, cram = prepared(None)
    ours = cram.state
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: seen.append(cram.state))
    thread.start()
    thread.join(10)
    assert seen[0] is not ours or ours.route is None
    assert seen[0].route is None
