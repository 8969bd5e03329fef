"""Answers by greedy generation, and counts of how the samples were routed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cram.console import ProgressBar
from cram.learning.batch_route import batch_route
from cram.learning.batches import EncodedSplit, Example, collate, pad_id, to_model
from cram.learning.run_folder import write_predictions
from cram.methods import Method
from cram.report.schema import Routing
from cram.routing.query import Route
from cram.scoring.scorers import score
from cram.streams.types import Task

# These arguments make `generate` greedy, whatever the checkpoint's own generation settings are.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": None,
    "top_p": None,
    "top_k": None,
}

Routed = Callable[[list[int]], AbstractContextManager[Any]]


@dataclass(frozen=True)
class TaskResult:
    """The result of a test on one task.

    Attributes:
        accuracy: Accuracy in percent.
        routing: How the samples were routed. None if the method has no expert of the task's own.
    """

    accuracy: float
    routing: Routing | None


def run_test(
    model: Any,
    processor: Any,
    method: Method,
    task: Task,
    split: EncodedSplit,
    predictions: Path,
    bar: ProgressBar,
) -> TaskResult:
    """Answer the test samples of a task, write the answers to `predictions` and score them."""
    answers, routing = answer_task(model, processor, method, task, split, bar)
    write_predictions(predictions, task.test, answers)
    by_id = {sample.id: answer for sample, answer in zip(task.test, answers, strict=True)}
    return TaskResult(float(score(task.scorer, by_id, task.test)), routing)


def answer_task(
    model: Any, processor: Any, method: Method, task: Task, split: EncodedSplit, bar: ProgressBar
) -> tuple[list[str], Routing | None]:
    """Answer the test samples of a task greedily.

    Returns:
        The answers, and how the samples were routed. The second is None if the method has no expert of the
        task's own.
    """
    cram = method.cram
    known = task.name in method.expert_groups()
    tally = RoutingTally(method, task.name) if known else None

    def count_route() -> None:
        if tally is not None and cram.state.route is not None:
            tally.add(cram.state.route)

    answers = generate_answers(
        model,
        processor.tokenizer,
        split.example,
        lambda indices: batch_route(method, task.name),
        lengths=[len(sample.instruction) for sample in task.test],
        max_new_tokens=task.max_new_tokens,
        batch_size=method.config.eval_batch_size,
        padding=pad_id(processor.tokenizer),
        bar=bar,
        seen=count_route,
    )
    return answers, tally.result() if tally is not None else None


class RoutingTally:
    """Counts the values of `Routing` over the samples of one task.

    Args:
        method: The method that routes.
        expert: Name of the task's own expert.
    """

    def __init__(self, method: Method, expert: str) -> None:
        groups = method.expert_groups()
        self._names = list(groups)
        self._own = self._names.index(expert)
        self._group = groups[expert]
        self._samples = self._right_group = self._right_expert = 0
        self._gates = torch.zeros(len(self._names), dtype=torch.float64)

    def add(self, route: Route) -> None:
        """Count a batch by its gates [L, S, E] and groups [S]."""
        gates = route.gates.double().mean(0).cpu()
        self._samples += len(gates)
        assert route.groups is not None
        self._right_group += int((route.groups == self._group).sum())
        self._right_expert += int((gates.argmax(1) == self._own).sum())
        self._gates += gates.sum(0)

    def result(self) -> Routing:
        """Return percentages and means over all samples."""
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
    """Answer the samples 0 .. N - 1 greedily. The longest prompts come first, padded on the left.

    Args:
        model: The attached model in evaluation mode.
        tokenizer: Decodes the answers.
        examples: Sample index -> encoded sample.
        routed: Sample indices of a batch -> context in which the batch generates.
        lengths: Length [N] of each prompt in any unit. Prompts of similar length share a batch.
        max_new_tokens: Length limit of an answer.
        batch_size: Samples per batch.
        padding: Padding id.
        bar: Progress bar, one step per sample.
        seen: Called after every batch. The batch's route is in the model's newest state.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    ends = end_ids(model, tokenizer)
    answers = [""] * len(lengths)
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        batch = to_model(collate([examples(index) for index in indices], padding, left=True), model)
        with routed(indices):
            output = model.generate(
                **batch,
                **GREEDY,
                max_new_tokens=max_new_tokens,
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


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end an answer: those of the model's generation config, and the end token of training."""
    own = model.generation_config.eos_token_id
    listed = own if isinstance(own, list) else [own]
    return sorted({tokenizer.eos_token_id, *(end for end in listed if end is not None)})
