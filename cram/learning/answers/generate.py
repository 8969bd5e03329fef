"""Answers by greedy generation, and counts of how the samples were routed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cram.console import ProgressBar
from cram.learning.answers.journal import AnswerRow, Journal
from cram.learning.batches import EncodedSplit, Example, collate, pad_id, to_model
from cram.learning.parallel.processes import is_first, own_share
from cram.learning.parallel.sharding import is_sharded
from cram.learning.step import batch_route
from cram.methods import Method
from cram.model.frozen.saving import Generate
from cram.report.schema import Published, Routing
from cram.routing.query import Route
from cram.scoring.scorers import score
from cram.streams.digests import pictures_digest, texts_digest
from cram.streams.types import Task

# Also in a caller's hands these arguments make `generate` greedy.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": None,
    "top_p": None,
    "top_k": None,
}

Keep = Callable[[dict[str, AnswerRow]], None]
Routed = Callable[[list[int]], AbstractContextManager[Any]]

# Accuracies that are closer than this, in percent, are the same.
DIFFERENT = 1e-9


@dataclass(frozen=True)
class TaskResult:
    """The result of a test on one task.

    Attributes:
        accuracy: Accuracy in percent.
        routing: How the samples were routed. None if the method has no expert of the task's own.
        published: The accuracy by the task's published rule, where that is another one.
    """

    accuracy: float
    routing: Routing | None
    published: Published | None = None


def run_test(
    model: Any,
    processor: Any,
    method: Method,
    task: Task,
    split: EncodedSplit,
    predictions: Path,
    bar: ProgressBar,
    state: str,
) -> TaskResult:
    """Answer the test samples of a task, write the answers to `predictions` and score them.

    Several processes divide the batches. Batches are the same in every case, so the answers are too. Answers
    that an earlier process has left in the journal are not made again.

    Args:
        model: The attached model in evaluation mode.
        processor: The model's processor.
        method: The method.
        task: The task.
        split: Its encoded test samples.
        predictions: The file of predictions.
        bar: Progress bar, one step per sample.
        state: Names the state of the model.
    """

    def answer(batches: list[list[int]], keep: Keep) -> None:
        answer_batches(model, processor, method, task, split, bar, batches, keep)

    rows = journaled(model, task, predictions, state, method.config.eval_batch_size, bar, answer)
    by_id = {sample.id: row["text"] for sample, row in zip(task.test, rows, strict=True)}
    strict = float(score(task.scorer, by_id, task.test))
    return TaskResult(strict, routing_of(method, task.name, rows), published_result(task, by_id, strict))


def journaled(
    model: Any,
    task: Task,
    predictions: Path,
    state: str,
    batch_size: int,
    bar: ProgressBar,
    answer: Callable[[list[list[int]], Keep], None],
) -> list[AnswerRow]:
    """Answer the test samples of a task, which the processes divide, with the journal; see `run_test`.

    Args:
        model: The model that answers. If it is sharded, all processes run every forward together.
        task: The task.
        predictions: The file of predictions.
        state: Names what answers.
        batch_size: Samples per batch.
        bar: Progress bar.
        answer: Answers batches, and hands the answers of each on by id.

    Returns:
        A row per test sample, in every process.
    """
    of = {
        "state": state,
        "samples": texts_digest(task.test),
        "pictures": pictures_digest(task.test),
        "max_new_tokens": task.max_new_tokens,
    }
    journal = Journal(predictions, task.test, of)
    answered = journal.start()
    bar.advance(len(answered))
    batches = length_batches([len(sample.instruction) for sample in task.test], batch_size)
    left = [part for part in batches if not answered.issuperset(task.test[index].id for index in part)]
    if is_sharded(model):
        answer(left, journal.add if is_first() else lambda answers: None)
    else:
        answer(own_share(left), journal.add)
    return journal.finish()


def published_result(task: Task, answers: dict[str, str], strict: float) -> Published | None:
    """Return the accuracy of a task by its published rule; None where it is the strict one."""
    if task.published is None:
        return None
    found = float(score(task.published, answers, task.test))
    if abs(found - strict) < DIFFERENT:
        return None
    return {"rule": task.published, "accuracy": found, "difference": found - strict}


def published_line(task: str, published: Published) -> str:
    """Return what is said of a task whose published accuracy is not the strict one."""
    rule, accuracy, difference = published["rule"], published["accuracy"], published["difference"]
    return f"{task}: {accuracy:.2f} by the published rule {rule}, {difference:+.2f} against the strict one"


def answer_task(
    model: Any, processor: Any, method: Method, task: Task, split: EncodedSplit, bar: ProgressBar
) -> tuple[list[str], Routing | None]:
    """Answer the test samples of a task greedily, without writing anything.

    Returns:
        The answers, and how the samples were routed. The second is None if the method has no expert of the
        task's own.
    """
    found: dict[str, AnswerRow] = {}
    batches = length_batches([len(sample.instruction) for sample in task.test], method.config.eval_batch_size)
    answer_batches(model, processor, method, task, split, bar, batches, found.update)
    rows = [found[sample.id] for sample in task.test]
    return [row["text"] for row in rows], routing_of(method, task.name, rows)


def answer_batches(
    model: Any,
    processor: Any,
    method: Method,
    task: Task,
    split: EncodedSplit,
    bar: ProgressBar,
    batches: list[list[int]],
    keep: Keep,
) -> None:
    """Answer some batches of a task's test samples greedily; `keep` gets the answers of each batch by id."""
    known = task.name in method.expert_groups()

    def made(indices: list[int], texts: Sequence[str]) -> None:
        routed = (
            _routed_rows(method.cram.state.route, len(indices)) if known else [(None, None)] * len(indices)
        )
        keep(
            {
                task.test[index].id: {"text": text, "group": group, "gates": gates}
                for index, text, (group, gates) in zip(indices, texts, routed, strict=True)
            }
        )

    generate_answers(
        model,
        processor.tokenizer,
        split.example,
        lambda indices: batch_route(method, task.name),
        lengths=[len(sample.instruction) for sample in task.test],
        max_new_tokens=task.max_new_tokens,
        batch_size=method.config.eval_batch_size,
        padding=pad_id(processor.tokenizer),
        bar=bar,
        batches=batches,
        made=made,
    )


def _routed_rows(route: Route | None, rows: int) -> list[tuple[int | None, list[float] | None]]:
    """Group and mean gates [E] over the layers of every row of a batch."""
    assert route is not None and route.groups is not None
    gates = route.gates.double().mean(0).cpu().expand(rows, -1).tolist()
    return list(zip(route.groups.expand(rows).tolist(), gates, strict=True))


def routing_of(method: Method, expert: str, rows: Sequence[AnswerRow]) -> Routing | None:
    """Return how the samples of a task were routed; None if the method has no expert of the task's own.

    Args:
        method: The method that routed.
        expert: Name of the task's own expert.
        rows: The answers.
    """
    groups = method.expert_groups()
    if expert not in groups:
        return None
    names = list(groups)
    gates = torch.tensor([row["gates"] for row in rows], dtype=torch.float64)
    right_group = sum(row["group"] == groups[expert] for row in rows)
    right_expert = int((gates.argmax(1) == names.index(expert)).sum())
    return {
        "group_accuracy": 100 * right_group / len(rows),
        "expert_accuracy": 100 * right_expert / len(rows),
        "mean_gates": dict(zip(names, gates.mean(0).tolist(), strict=True)),
        "gate_entropy": float(torch.special.entr(gates.clamp(min=0)).sum(1).mean()),
    }


def length_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Return the indices of the samples in batches of similar lengths, the longest first."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


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
    batches: list[list[int]] | None = None,
    made: Callable[[list[int], Sequence[str]], None] | None = None,
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
        batches: Some of the batches of `length_batches`; by default all. Other answers stay empty.
        made: Called after every batch with its indices and answers.
    """
    greedy = greedy_view(model)
    ends = end_ids(model, tokenizer)
    answers = [""] * len(lengths)
    for indices in length_batches(lengths, batch_size) if batches is None else batches:
        batch = to_model(collate([examples(index) for index in indices], padding, left=True), model)
        with routed(indices):
            output = greedy.generate(
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
        if made is not None:
            made(indices, texts)
        bar.advance(len(indices))
    return answers


def greedy_view(model: Any) -> Any:
    """The model without the checkpoint's own generation settings, which may hold penalties and lengths.

    Everything else is shared with the model, also while another thread generates with it.
    """
    from transformers import GenerationConfig

    view = copy.copy(model)
    if "generate" in view.__dict__:
        view.generate = Generate(view)
    view.generation_config = GenerationConfig()
    return view


def _decode(tokenizer: Any, ids: Tensor) -> Sequence[str]:
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end an answer: those of the model's generation config, and the end token of training."""
    own = model.generation_config.eos_token_id
    listed = own if isinstance(own, list) else [own]
    return sorted({tokenizer.eos_token_id, *(end for end in listed if end is not None)})
