"""What a method adds to inference: time and passes over the prompt, measured in the run itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from cram.attach import detach
from cram.families import family_of
from cram.learning.answers.generate import GREEDY, greedy_view
from cram.learning.batches import CACHE_BYTES, Budget, EncodedSplit, collate, pad_id, to_model
from cram.learning.learner import ContinualLearner
from cram.learning.step import batch_route
from cram.report.schema import Inference

REPEATS = 5
MOST_SAMPLES = 16


@torch.no_grad()
def measure_inference(learner: ContinualLearner) -> Inference:
    """Time `generate` with and without the method, on one batch of the last task. The model ends detached.

    Both make the same number of tokens, whatever the answers are. The first call of each is not timed.

    Args:
        learner: The learner after its run.
    """
    model, task = learner.model, learner.stream.tasks[-1]
    split = EncodedSplit(learner.processor, task.test, Budget(CACHE_BYTES))
    indices = list(range(min(MOST_SAMPLES, learner.config.eval_batch_size, len(task.test))))
    padding = pad_id(learner.processor.tokenizer)
    batch = to_model(collate([split.example(index) for index in indices], padding, left=True), model)

    def generate(routed: Callable[[], AbstractContextManager[Any]]) -> float:
        started = time.monotonic()
        with routed():
            greedy_view(model).generate(
                **batch,
                max_new_tokens=task.max_new_tokens,
                min_new_tokens=task.max_new_tokens,
                **GREEDY,
                pad_token_id=padding,
            )
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return time.monotonic() - started

    def mean_time(routed: Callable[[], AbstractContextManager[Any]]) -> float:
        times = [generate(routed) for _ in range(1 + REPEATS)]
        return sum(times[1:]) / REPEATS

    model.eval()
    first = model.get_submodule(f"{family_of(model).language_model}.layers.0")
    with _Prefills(first) as prefills:
        adapted = mean_time(lambda: batch_route(learner.method, task.name))
    detach(model)
    base = mean_time(nullcontext)
    return {
        "adapted": adapted,
        "base": base,
        "samples": len(indices),
        "tokens": task.max_new_tokens,
        "prefills": prefills.count / (1 + REPEATS),
    }


class _Prefills:
    """Counts the forwards of a decoder layer over more than one token."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer, self.count = layer, 0

    def __enter__(self) -> _Prefills:
        self._handle = self._layer.register_forward_pre_hook(self._seen, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _seen(self, layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden = arguments[0] if arguments else named["hidden_states"]
        self.count += hidden.shape[-2] > 1
