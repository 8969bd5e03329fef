"""What the untrained base answers: the row of a report that every method must beat."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cram.atomic import read_json, write_json
from cram.console import ProgressBar
from cram.learning.answers.generate import Keep, generate_answers, journaled
from cram.learning.answers.journal import remove_parts
from cram.learning.answers.predict import evaluation
from cram.learning.batches import CACHE_BYTES, Budget, EncodedSplit, pad_id
from cram.learning.learner import ContinualLearner
from cram.learning.parallel.processes import by_first, is_first
from cram.learning.run_folder import digest_of
from cram.scoring.scorers import score
from cram.streams.types import Task

RESULT = "result.json"


def measure_base(learner: ContinualLearner, folder: Path, shown: bool = False) -> dict[str, float]:
    """Test the base of a learner on every task, with the experts switched off; later calls read the result.

    Several processes share the work, and all of them call it. A stopped test goes on where it was.

    Args:
        learner: The learner, before or after its run.
        folder: For `result.json` and `predictions/`.
        shown: True if progress is printed.

    Returns:
        Task -> accuracy.

    Raises:
        ValueError: If the folder has the answers of another model or to other samples.
    """
    stream = {name: value for name, value in learner.identity["stream"].items() if name != "splits"}
    of = digest_of({"stream": stream, "model": learner.identity["model"]})
    if (known := by_first(lambda: _known(folder, of))) is not None:
        return known
    tasks, predictions = learner.stream.tasks, folder / "predictions"
    accuracies: dict[str, float] = {}
    count = sum(len(task.test) for task in tasks)
    with evaluation(learner.model), ProgressBar("test the base", count, shown and is_first()) as bar:
        for index, task in enumerate(tasks):
            file = predictions / f"{index + 1:02d}-{task.name}.jsonl"
            answer, size = partial(_answer, learner, task, bar), learner.config.eval_batch_size
            rows = journaled(learner.model, task, file, of, size, bar, answer)
            by_id = {sample.id: row["text"] for sample, row in zip(task.test, rows, strict=True)}
            accuracies[task.name] = float(score(task.scorer, by_id, task.test))
    by_first(lambda: write_json(folder / RESULT, {"of": of, "accuracies": accuracies}))
    by_first(lambda: remove_parts(predictions))
    return accuracies


def _known(folder: Path, of: str) -> dict[str, float] | None:
    """The result of an earlier call, or None."""
    if not (folder / RESULT).is_file():
        return None
    known = read_json(folder / RESULT)
    if known.get("of") != of:
        raise ValueError(
            f"{folder} must have the base's answers to this stream, got those of another base or stream; "
            "remove the folder, or name another one with --out"
        )
    found: dict[str, float] = known["accuracies"]
    return found


def _answer(learner: ContinualLearner, task: Task, bar: ProgressBar, batches: Any, keep: Keep) -> None:
    """Answer some batches of a task's test samples by the base alone."""

    def made(indices: list[int], texts: Sequence[str]) -> None:
        ids = [task.test[index].id for index in indices]
        keep(
            {
                name: {"text": text, "group": None, "gates": None}
                for name, text in zip(ids, texts, strict=True)
            }
        )

    generate_answers(
        learner.model,
        learner.processor.tokenizer,
        EncodedSplit(learner.processor, task.test, Budget(CACHE_BYTES)).example,
        lambda _: learner.cram.disabled(),
        lengths=[len(sample.instruction) for sample in task.test],
        max_new_tokens=task.max_new_tokens,
        batch_size=learner.config.eval_batch_size,
        padding=pad_id(learner.processor.tokenizer),
        bar=bar,
        batches=batches,
        made=made,
    )
