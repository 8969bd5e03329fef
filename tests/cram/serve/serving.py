"""What the tests of the server share: requests, and the offline answer that each must equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from cram.learning.answers.generate import GREEDY
from cram.serve.request import Collector, Prompt, Request, Sampling
from tests.cram.factories import image, prompt

ENDS = (2,)


def llava_prompt(processor: Any, question: str, *seeds: int) -> Prompt:
    """A question about pictures in the form of LLaVA-1.5."""
    pictures = [image(seed) for seed in seeds]

    def encode() -> Mapping[str, Tensor]:
        text = prompt(question, len(pictures))
        return dict(processor(text=[text], images=pictures or None, return_tensors="pt"))

    return Prompt(encode, question, tuple(pictures))


def offline(
    model: Any,
    asked: Prompt,
    tokens: int,
    route: AbstractContextManager[Any] | None = None,
    ends: Sequence[int] = ENDS,
) -> list[int]:
    """The greedy answer of `model.generate` to one prompt alone, end token included."""
    inputs = dict(asked.encode())
    with torch.no_grad(), route or nullcontext():
        limits = {"max_new_tokens": tokens, "eos_token_id": list(ends), "pad_token_id": 0}
        made = model.generate(**inputs, **GREEDY, **limits)
    answer: list[int] = made[0, inputs["input_ids"].shape[1] :].tolist()
    return answer


def ask(
    asked: Prompt, mixture: Mapping[str, float] | None = None, **sampling: Any
) -> tuple[Request, Collector]:
    """A request and the collector that listens to it."""
    settings = Sampling(**{"max_tokens": 8, **sampling})
    heard = Collector(settings.n)
    return Request(asked, heard, settings, mixture), heard


def run(engine: Any, *collectors: Collector) -> None:
    """Turn the engine by hand until every request has its last event."""
    for _ in range(1000):
        if all(each.done.is_set() for each in collectors):
            return
        engine.turn()
    raise AssertionError("the engine must answer within 1000 turns, got requests without an answer")
