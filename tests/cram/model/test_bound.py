"""Decode steps that repeat a call: the bits of calls made anew, also after anything was exchanged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import DynamicCache

import cram.model.linear
import cram.model.stack
from cram.model.stack import Bound
from cram_kernels import native_libraries
from cram_kernels.expert_lora import native, stacked
from tests.cram.factories import QUESTIONS, continuing, image, prompt, routed_llava

pytestmark = pytest.mark.skipif(native_libraries()["cpu"] is not None, reason="binds native calls")
TOKEN = torch.tensor([[9]])
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")


class Doubled(nn.Linear):
    """A linear that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Twice(nn.Module):
    """A parametrisation."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Outputs of bound calls."""
    found: list[Tensor] = []
    output = Bound.output

    def counted(self: Bound, linear: nn.Module, x: Tensor) -> Tensor | None:
        y = output(self, linear, x)
        if y is not None:
            found.append(y)
        return y

    monkeypatch.setattr(Bound, "output", counted)
    return found


def prefill(dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[Any, Any, Any]:
    """A model, its handle, and a cache behind one question."""
    model, processor, attached = routed_llava(target_projections=PROJECTIONS, **settings)
    model.to(dtype)
    batch = processor(text=[prompt(QUESTIONS[0], 1)], images=[image(0)], return_tensors="pt").to(dtype)
    cache = DynamicCache(config=model.config.get_text_config())
    model(**batch, **continuing(model, cache), use_cache=True)
    return model, attached, cache


def step(model: Any, cache: Any) -> Tensor:
    logits: Tensor = model(input_ids=TOKEN, **continuing(model, cache), use_cache=True).logits
    return logits.detach()


Change = Callable[[Any], Any]


def replace_weight(linear: Any) -> None:
    linear.base.weight = nn.Parameter(2 * linear.base.weight, requires_grad=False)


def replace_base(linear: Any) -> None:
    base = Doubled(linear.in_features, linear.out_features, bias=linear.bias is not None)
    base.load_state_dict(linear.base.state_dict())
    linear.base = base.requires_grad_(False)


def add_bias(linear: Any) -> None:
    linear.base.bias = nn.Parameter(torch.ones(linear.out_features), requires_grad=False)


def new_experts(linear: Any) -> None:
    linear.experts = copy.deepcopy(linear.experts)
    linear.experts.bt.mul_(2)


def new_buffer(linear: Any) -> None:
    linear.experts.bt = 2 * linear.experts.bt


def other_owners(linear: Any) -> None:
    linear.experts.expert_of_row = torch.zeros_like(linear.experts.expert_of_row)


def own_forward(linear: Any) -> None:
    forward = linear.base.forward
    linear.base.forward = lambda x: 2 * forward(x)


def add_solo(linear: Any) -> None:
    a, b = torch.ones(2, linear.in_features), torch.ones(linear.out_features, 2)
    linear.set_solo((a, b), 1.0, trained=False)


CHANGES: dict[str, Change] = {
    "weight": replace_weight,
    "weight in place": lambda linear: linear.base.weight.mul_(2),
    "data of the weight": lambda linear: setattr(linear.base.weight, "data", 2 * linear.base.weight),
    "bias": add_bias,
    "base": replace_base,
    "parametrised base": lambda linear: parametrize.register_parametrization(linear.base, "weight", Twice()),
    "own forward": own_forward,
    "forward hook": lambda linear: linear.base.register_forward_hook(lambda module, inputs, y: 2 * y),
    "forward pre-hook": lambda linear: linear.base.register_forward_pre_hook(lambda module, x: (2 * x[0],)),
    "experts": new_experts,
    "experts in place": lambda linear: linear.experts.a.mul_(2),
    "a buffer of the experts": new_buffer,
    "owners of the rows": other_owners,
    "solo experts": add_solo,
    "class of the base": lambda linear: setattr(linear.base, "__class__", Doubled),
    "nothing": lambda linear: None,
}


def last_step(change: Change, place: str, around: Callable[[], AbstractContextManager[Any]]) -> Tensor:
    """Logits of a third decode step, before which one linear was changed."""
    with torch.no_grad():
        model, attached, cache = prefill()
        step(model, cache)
        step(model, cache)
        change(next(linear for path, linear in attached.modules.items() if path.endswith(place)))
        with around():
            return step(model, cache)


def anew(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> Tensor:
    """`last_step` without bound calls."""
    with monkeypatch.context() as patch:
        patch.setattr(cram.model.linear, "bound", lambda *_: None)
        return last_step(*arguments)


@pytest.mark.parametrize("place", ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_linear_is_computed_as_it_is_now(
    change: str, place: str, repeated: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = anew(monkeypatch, CHANGES[change], place, nullcontext)
    assert not repeated
    found = last_step(CHANGES[change], place, nullcontext)
    assert torch.equal(found, expected) and len(repeated) > 10
    unchanged = last_step(CHANGES["nothing"], place, nullcontext)
    assert torch.equal(found, unchanged) == (change == "nothing")


@pytest.mark.parametrize("place", ["o_proj", "down_proj"])
def test_a_changed_scale_is_obeyed(
    place: str, repeated: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linears with one input must share their scale."""

    def double(linear: Any) -> None:
        linear.experts.scale *= 2

    expected = anew(monkeypatch, double, place, nullcontext)
    assert torch.equal(last_step(double, place, nullcontext), expected) and repeated
    assert not torch.equal(last_step(CHANGES["nothing"], place, nullcontext), expected)


@pytest.mark.parametrize("first", [True, False])
def test_solo_experts_that_training_mode_leaves_out_act_after_it(
    first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def steps() -> Tensor:
        with torch.no_grad():
            model, attached, cache = prefill()
            for linear in attached.modules.values():
                add_solo(linear)
            for training in (first, first, not first):
                model.train(training)
                logits = step(model, cache)
            return logits

    found = steps()
    monkeypatch.setattr(cram.model.linear, "bound", lambda *_: None)
    assert torch.equal(found, steps())


def test_dropout_of_an_expert_in_training_begins_with_training_mode(repeated: list[Tensor]) -> None:
    found = []
    for training in (False, True):
        with torch.no_grad():
            model, _, cache = prefill(trained=True, dropout=0.5)
            step(model, cache)
            step(model, cache)
            found.append(step(model.train(training), cache))
    assert repeated and not torch.equal(*found)


@pytest.mark.parametrize("change", ["experts in place", "nothing"])
def test_copies_of_factors_in_another_dtype_follow_their_values(
    change: str, repeated: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "rounds_factors", lambda: True)

    def steps() -> Tensor:
        with torch.no_grad():
            model, attached, cache = prefill(torch.bfloat16)
            step(model, cache)
            step(model, cache)
            for linear in attached.modules.values():
                CHANGES[change](linear)
            return step(model, cache)

    found = steps()
    assert repeated
    monkeypatch.setattr(cram.model.linear, "bound", lambda *_: None)
    assert torch.equal(found, steps())


@pytest.mark.parametrize(
    "around", [lambda: torch.autocast("cpu", torch.bfloat16), torch.enable_grad, torch.inference_mode]
)
def test_other_modes_of_torch_are_obeyed(around: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = CHANGES["nothing"]
    expected = anew(monkeypatch, nothing, "q_proj", around)
    assert torch.equal(last_step(nothing, "q_proj", around), expected)


def test_gradients_after_steps_without(repeated: list[Tensor]) -> None:
    with torch.no_grad():
        model, _, cache = prefill()
        step(model, cache)
        step(model, cache)
    count = len(repeated)
    embeds = model.get_input_embeddings()(TOKEN).detach().requires_grad_()
    model(inputs_embeds=embeds, **continuing(model, cache), use_cache=True).logits.sum().backward()
    assert embeds.grad is not None and embeds.grad.abs().sum() > 0 and len(repeated) == count


def test_each_cache_has_the_calls_of_its_own_route(repeated: list[Tensor]) -> None:
    """Two caches with different gates, continued in turn."""
    with torch.no_grad():
        model, processor, attached = routed_llava()
        caches, found = [], []
        for number in (0, 1):
            batch = processor(text=[prompt(QUESTIONS[number], 1)], images=[image(0)], return_tensors="pt")
            caches.append(DynamicCache(config=model.config.get_text_config()))
            model(**batch, **continuing(model, caches[-1]), use_cache=True)
        alone = copy.deepcopy(caches[0])
        for _ in range(3):
            found.append([step(model, cache) for cache in caches])
        assert repeated
        attached.hooks.adopt(alone, attached.hooks._caches.get(caches[0]))
        assert all(torch.equal(step(model, alone), first) for first, _ in found)
        assert not torch.equal(found[0][0], found[0][1])


def test_overrides_make_every_call_anew(repeated: list[Tensor]) -> None:
    with torch.no_grad():
        model, attached, cache = prefill()
        step(model, cache)
        repeated.clear()
        with attached.disabled():
            step(model, cache)
        assert not repeated


def test_a_wrong_input_is_explained(repeated: list[Tensor]) -> None:
    with torch.no_grad():
        model, attached, cache = prefill()
        step(model, cache)
        step(model, cache)
        q = next(linear for path, linear in attached.modules.items() if path.endswith("q_proj"))
        q.current.state = attached.hooks._caches.get(cache)
        with pytest.raises(ValueError, match=r"x must be \[..., 32\], got \[1, 31\]"):
            q(torch.randn(1, 31))


def test_nothing_is_bound_where_each_call_must_be_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        _, attached, _ = prefill()
        q = next(linear for path, linear in attached.modules.items() if path.endswith("q_proj"))
        layer, gates = q.as_layer(), attached.state.gates[0]
        x = torch.randn(1, q.in_features)
        assert layer is not None and stacked.bound_expert_lora(x, [layer], gates) is not None
        assert stacked.bound_expert_lora(x, [layer], gates[:, :1]) is None, "columns of the gates"
        assert stacked.bound_expert_lora(x, [layer] * 4, gates) is None, "more than three layers"
        assert stacked.bound_expert_lora(x.double(), [layer], gates) is None, "float64"
        with torch.enable_grad():
            assert stacked.bound_expert_lora(x, [layer], gates) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert stacked.bound_expert_lora(x, [layer], gates) is None
