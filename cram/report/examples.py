"""Sample pictures for the report page: questions with the expected answer and what each method answered.

The answers are those of the last test. They are read from the run folders and joined by the ids of the
questions.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cram.scoring.scorers import score
from cram.streams.types import Sample, Stream, Task, open_image

PER_TASK = 3
SIDE_PX = 256  # longest side of a picture on the page
BASE = "base"  # folder and name of the untrained base


@dataclass(frozen=True)
class Said:
    """What a method answered, and whether the task's scorer gives it the full score alone."""

    method: str
    text: str
    right: bool


@dataclass(frozen=True)
class Example:
    """One question of the page.

    Attributes:
        task: Name of the task.
        question: The user's turn.
        expected: The accepted answers, joined.
        pictures: Data URLs.
        answers: One entry per method.
    """

    task: str
    question: str
    expected: str
    pictures: tuple[str, ...]
    answers: tuple[Said, ...]


def gather_examples(folder: Path, stream: Stream, per_task: int = PER_TASK) -> list[Example]:
    """The first questions of each task that every method has answered in its last test.

    Args:
        folder: A run folder, or the folder of a comparison, of which the first seed is shown.
        stream: The stream of that run or seed.
        per_task: Maximum number of questions per task.
    """
    runs = answer_folders(folder)
    found = []
    for index, task in enumerate(stream.tasks):
        given = {name: _answers(runs[name], index, task.name) for name in runs}
        given = {name: answers for name, answers in given.items() if answers}
        shared = [s for s in task.test if given and all(s.id in answers for answers in given.values())]
        found += [_example(task, sample, given) for sample in shared[:per_task]]
    return found


def answer_folders(folder: Path) -> dict[str, Path]:
    """Method -> folder with the answers of its last test, in the order of the report; the base comes last."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    if "seeds" not in report and (folder / "tasks").is_dir():
        (method,) = report["methods"]
        runs = {method: folder, BASE: folder / BASE}
    else:
        methods = next(iter(report["seeds"].values())) if "seeds" in report else report["methods"]
        seed = folder / "seeds" / (next(iter(report["seeds"])) if "seeds" in report else "0")
        runs = {name: seed / name for name in methods if (seed / name).is_dir()} | {BASE: seed / BASE}
    newest = {name: sorted(run.glob("tasks/[0-9]*/result.json"))[-1:] for name, run in runs.items()}
    found = {name: files[0].parent / "predictions" for name, files in newest.items() if files}
    if (answers := runs[BASE] / "predictions").is_dir():
        found[BASE] = answers
    return found


def _answers(folder: Path, index: int, task: str) -> dict[str, str]:
    file = folder / f"{index + 1:02d}-{task}.jsonl"
    if not file.is_file():
        return {}
    # Only "\n" ends a line: JSON strings may hold the other separators of `splitlines`.
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    return {row["question_id"]: row["text"] for row in rows}


def _example(task: Task, sample: Sample, given: Mapping[str, Mapping[str, str]]) -> Example:
    said = [Said(name, answers[sample.id], _right(task, sample, answers)) for name, answers in given.items()]
    pictures = tuple(_data_url(sample, place) for place in range(len(sample.images)))
    return Example(task.name, sample.instruction, " / ".join(sample.accepted), pictures, tuple(said))


def _right(task: Task, sample: Sample, answers: Mapping[str, str]) -> bool:
    return float(score(task.scorer, {sample.id: answers[sample.id]}, [sample])) >= 100


def _data_url(sample: Sample, place: int) -> str:
    picture = open_image(sample.images[place])
    picture.thumbnail((SIDE_PX, SIDE_PX))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG" if picture.width * picture.height <= 128 * 128 else "JPEG", quality=85)
    kind = "png" if buffer.getvalue().startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def by_task(examples: Sequence[Example]) -> list[tuple[str, list[Example]]]:
    """(task, its examples), in the order of learning."""
    names = dict.fromkeys(example.task for example in examples)
    return [(name, [example for example in examples if example.task == name]) for name in names]
