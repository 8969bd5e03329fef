"""The answers to a test split as they are made, so that a stopped evaluation goes on where it was.

    predictions/01-colour.jsonl           finished: {question_id, text} for every test sample, in order
    predictions/.01-colour.jsonl.part-0   answers so far, one file per process; gone with the evaluation's end

The first line of a part says which state answers which samples; parts of anything else are dropped. A last
line that was cut short is dropped as well. A finished file always has exactly the ids of the test samples.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from cram.atomic import write_text
from cram.learning.parallel.processes import by_first, rank
from cram.scoring.scorers import check_coverage
from cram.streams.types import Sample

PART = ".part-"


class AnswerRow(TypedDict):
    """One answer: its text, and how the sample was routed, where the method has groups.

    Attributes:
        text: The answer.
        group: Instruction group, or None.
        gates: Mean gate of each expert over the layers, or None.
    """

    text: str
    group: int | None
    gates: list[float] | None


class Journal:
    """The answers to one test split.

    Args:
        file: The finished file.
        samples: The test split.
        of: What answers: JSON values that change with the state of the model.
    """

    def __init__(self, file: Path, samples: Sequence[Sample], of: dict[str, Any]) -> None:
        self._file, self._samples, self._of = file, samples, of

    def start(self) -> set[str]:
        """Return the ids that are answered already, and begin this process's part. All processes call it."""
        found = by_first(self._gather)
        if rank():
            self._append(self._header())
        return found

    def add(self, answers: dict[str, AnswerRow]) -> None:
        """Write answers by id. They are on the disk when this returns."""
        rows = [{"question_id": name, **row} for name, row in answers.items()]
        self._append("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))

    def finish(self) -> list[AnswerRow]:
        """Write the finished file; returns the answers in the order of the samples. All processes call it.

        Raises:
            ValueError: If a sample has no answer.
        """
        by_first(lambda: None)  # Every process has written all of its answers.
        return by_first(self._complete)

    def _complete(self) -> list[AnswerRow]:
        answers = self._read()
        check_coverage({name: row["text"] for name, row in answers.items()}, self._samples)
        write_predictions(self._file, self._samples, [answers[sample.id]["text"] for sample in self._samples])
        return [answers[sample.id] for sample in self._samples]

    def _gather(self) -> set[str]:
        """Put all answers so far into the first process's part."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        answers = self._read()
        rows = [{"question_id": name, **row} for name, row in answers.items()]
        lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
        write_text(self._part(0), self._header() + lines)
        for part in self._parts():
            if part != self._part(0):
                part.unlink()
        return set(answers)

    def _read(self) -> dict[str, AnswerRow]:
        known = {sample.id for sample in self._samples}
        found: dict[str, AnswerRow] = {}
        for part in self._parts():
            # A line is whole only with its end.
            lines = part.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
            if not lines or lines[0] + "\n" != self._header():
                continue
            for line in lines[1:]:
                if (read := _row(line)) is None:
                    break
                name, row = read
                if name in known:
                    found[name] = row
        return found

    def _header(self) -> str:
        return json.dumps({"of": self._of}, sort_keys=True) + "\n"

    def _append(self, text: str) -> None:
        with self._part(rank()).open("a", encoding="utf-8") as part:
            part.write(text)
            part.flush()
            os.fsync(part.fileno())

    def _part(self, process: int) -> Path:
        return self._file.with_name(f".{self._file.name}{PART}{process}")

    def _parts(self) -> list[Path]:
        return sorted(self._file.parent.glob(f".{self._file.name}{PART}*"))


def write_predictions(file: Path, samples: Sequence[Sample], answers: Sequence[str]) -> None:
    """Write the answers to a test split as JSON lines `{question_id, text}`, in the order of the samples."""
    pairs = zip(samples, answers, strict=True)
    rows = [{"question_id": sample.id, "text": answer} for sample, answer in pairs]
    write_text(file, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))


def remove_parts(predictions: Path) -> None:
    """Delete the parts in a folder of predictions, behind the evaluation's result."""
    for part in predictions.glob(f".*{PART}*"):
        part.unlink()


def _row(line: str) -> tuple[str, AnswerRow] | None:
    """Id and answer of a line, or None where the line is damaged."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or row.keys() != {"question_id", "text", "group", "gates"}:
        return None
    return row.pop("question_id"), row  # type: ignore[return-value]
