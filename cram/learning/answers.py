"""Answers by greedy generation, and how the samples were routed while they were given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from cram.attach import Cram
from cram.console import ProgressBar
from cram.learning.batch_route import batch_route
from cram.learning.batches import EncodedSplit, Example, collate, pad_id, to_model
from cram.methods import Method
from cram.report.schema import Routing
from cram.routing.query import Route
from cram.streams.types import Task

Routed = Callable[[list[int]], AbstractContextManager[Any]]


def answer_task(
    model: Any, processor: Any, method: Method, task: Task, split: EncodedSplit, bar: ProgressBar
) -> tuple[list[str], Routing | None]:
    """Greedy answers to the test samples of a task.

    Returns:
        The answers, and how the samples were routed, where the method routes and knows the task's own expert.
    """
    cram = method.cram
    known = method.routed and task.name in cram.router.expert_names
    tally = RoutingTally(cram, task.name) if known else None

    def count_route() -> None:
        if tally is not None and cram.router.current is not None:
            tally.add(cram.router.current)

    answers = generate_answers(
        model,
        processor.tokenizer,
        split.example,
        lambda indices: batch_route(model, method, task.name, split, indices),
        lengths=[len(sample.instruction) for sample in task.test],
        max_new_tokens=task.max_new_tokens,
        batch_size=method.config.eval_batch_size,
        padding=pad_id(processor.tokenizer),
        bar=bar,
        seen=count_route,
    )
    return answers, tally.result() if tally is not None else None


class RoutingTally:
    """Counts, over the samples of one task, what `Routing` reports.

    Args:
        cram: The attached model's experts.
        expert: Name of the task's own expert.
    """

    def __init__(self, cram: Cram, expert: str) -> None:
        self._names = cram.router.expert_names
        self._own = self._names.index(expert)
        self._group = cram.router.expert_groups[self._own]
        self._samples = self._right_group = self._right_expert = 0
        self._gates = torch.zeros(len(self._names), dtype=torch.float64)

    def add(self, route: Route) -> None:
        """Count a batch by its gates [L, S, E] and groups [S]."""
        gates = route.gates.double().mean(0).cpu()
        self._samples += len(gates)
        self._right_group += int((route.groups == self._group).sum())
        self._right_expert += int((gates.argmax(1) == self._own).sum())
        self._gates += gates.sum(0)

    def result(self) -> Routing:
        """The percentages and means over all samples."""
        return {
            "group_accuracy": 100 * self._right_group / self._samples,
            "expert_accuracy": 100 * self._right_expert / self._samples,
            "mean_gates": dict(zip(self._names, (self._gates / self._samples).tolist(), strict=True)),
        }


@torch.no_grad()
def generate_answers(
    model: Any,
    tokenizer: Any,
    examples: Callable[[int], Example],
    routed: Routed,
    *,
    lengths: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    padding: int,
    bar: ProgressBar,
    seen: Callable[[], None] | None = None,
) -> list[str]:
    """Greedy answers to the samples 0 .. N - 1, longest prompts first, padded on the left.

    Args:
        model: The attached model in evaluation mode.
        tokenizer: Decodes the answers.
        examples: Encoded sample by index.
        routed: Context under which a batch, given by its sample indices, generates.
        lengths: Length [N] of each sample's prompt in any unit; alike ones share a batch.
        max_new_tokens: Length limit of an answer.
        batch_size: Samples a batch.
        padding: Padding id.
        bar: Progress, a sample each.
        seen: Called after every batch, while its route is the router's current one.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    ends = _end_ids(model, tokenizer)
    answers = [""] * len(lengths)
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        batch = to_model(collate([examples(index) for index in indices], padding, left=True), model)
        with routed(indices):
            output = model.generate(
                **batch,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=ends,
                pad_token_id=padding,
            )
        texts = _decode(tokenizer, output[:, batch["input_ids"].shape[1] :])
        for index, text in zip(indices, texts, strict=True):
            answers[index] = text
        if seen is not None:
            seen()
        bar.advance(len(indices))
    return answers


def _decode(tokenizer: Any, ids: Tensor) -> Sequence[str]:
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end an answer: those of the model's generation config and the one that training puts there."""
    own = model.generation_config.eos_token_id
    listed = own if isinstance(own, list) else [own]
    return sorted({tokenizer.eos_token_id, *(end for end in listed if end is not None)})
