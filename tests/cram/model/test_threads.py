"""Threads that use one model at once: each has its own route, its own override and its own inputs."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from cram.routing.threads import PerThread
from tests.cram.factories import QUESTIONS, image, prompt, routed_llava

PATIENCE_S = 120


def batch_of(processor: Any, index: int) -> Any:
    return processor(text=[prompt(QUESTIONS[index])], images=[image(index)], return_tensors="pt")


def together(*jobs: Callable[[], Any]) -> list[Any]:
    """The results of jobs that run at once, each in a thread; an error in one is raised."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        futures = [pool.submit(job) for job in jobs]
        return [future.result(PATIENCE_S) for future in futures]


def meeting(model: Any) -> None:
    """Makes two threads wait for each other where one could take the other's inputs or route."""
    barrier = threading.Barrier(2, timeout=PATIENCE_S)

    def wait(*_: Any) -> None:
        barrier.wait()

    language = model.model.language_model
    language.register_forward_pre_hook(wait, prepend=True)
    for layer in language.layers:
        layer.self_attn.q_proj.register_forward_pre_hook(wait)


def test_two_threads_generate_along_two_routes() -> None:
    model, processor, cram = routed_llava()
    batches = [batch_of(processor, index) for index in range(2)]
    overrides = (nullcontext, lambda: cram.forced("other"), cram.disabled)

    def answer(index: int, override: Any) -> torch.Tensor:
        with override(), torch.no_grad():
            scores = model.generate(
                **batches[index],
                max_new_tokens=3,
                min_new_tokens=3,
                do_sample=False,
                output_scores=True,
                return_dict_in_generate=True,
            ).scores
        return torch.stack(scores)

    pairs = [((0, overrides[a]), (1, overrides[b])) for a, b in ((0, 0), (0, 1), (2, 1))]
    expected = [[answer(*job) for job in pair] for pair in pairs]
    assert not torch.allclose(expected[0][0], expected[2][0])
    meeting(model)
    for pair, alone in zip(pairs, expected, strict=True):
        found = together(*(lambda job=job: answer(*job) for job in pair))
        assert all(torch.equal(*each) for each in zip(found, alone, strict=True))


@pytest.mark.parametrize("entered", ["fixed", "disabled"])
def test_a_thread_that_is_started_inside_an_override_must_enter_its_own(entered: str) -> None:
    model, processor, cram = routed_llava()
    batch = batch_of(processor, 0)
    with cram.fixed(torch.ones(3)) if entered == "fixed" else cram.disabled():
        inside = model(**batch).logits
        with pytest.raises(ValueError, match="must be entered in the thread that runs the model"):
            together(lambda: model(**batch))

        def explicit() -> torch.Tensor:
            with cram.forced("old"):
                return model(**batch).logits

        (found,) = together(explicit)
        assert not torch.allclose(found, inside)
        assert torch.equal(model(**batch).logits, inside)
    (outside,) = together(lambda: model(**batch).logits)
    assert torch.equal(outside, model(**batch).logits)


def test_values_of_threads() -> None:
    value: PerThread[int] = PerThread(0)
    value.set(1)
    assert together(value.get, lambda: (value.set(5), value.get())[1]) == [0, 5]
    assert value.get() == 1


def test_a_copy_of_a_value_begins_anew() -> None:
    value: PerThread[int] = PerThread(3)
    value.set(1)
    for made in (copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
        assert made.get() == 3
        made.set(5)
        assert made.get() == 5 and value.get() == 1


def test_an_attached_assistant_follows_its_route() -> None:
    model, processor, cram = routed_llava()
    main, _, _ = routed_llava()
    batch = batch_of(processor, 0)
    settings = {"max_new_tokens": 5, "do_sample": False}
    expected = main.generate(**batch, **settings)
    with cram.fixed(cram.route(cram.encode(QUESTIONS[:1], [[image(0)]]))):
        assert torch.equal(main.generate(**batch, assistant_model=model, **settings), expected)


def test_training_after_inference_mode() -> None:
    model, processor, cram = routed_llava()
    cram.method.warm_up.begin()
    batch = batch_of(processor, 0)
    with torch.inference_mode():
        model(**batch)
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in cram.trainable_parameters())
