"""Predictions as they are made: a stopped evaluation goes on, cut lines and other states are dropped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cram.learning import answers
from cram.learning.evaluate import evaluate_run
from cram.learning.journal import Journal, remove_parts
from cram.streams import Sample
from tests.cram import factories, runs
from tests.cram.runs import results, timeless

SAMPLES = [Sample(name, (), "q", "a") for name in ("x", "y", "z")]
ROW: Any = {"text": "a", "group": 0, "gates": [0.5, 0.5]}


class Cut(BaseException):
    """Stands for a process that dies while it answers."""


def started(file: Path, state: str = "s") -> tuple[Journal, set[str]]:
    journal = Journal(file, SAMPLES, {"state": state})
    return journal, journal.start()


def part(file: Path) -> Path:
    return file.with_name(f".{file.name}.part-0")


def test_answers_survive_and_a_finished_file_has_every_sample(tmp_path: Path) -> None:
    file = tmp_path / "p/01.jsonl"
    journal, known = started(file)
    assert known == set()
    journal.add({"y": {**ROW, "text": "ü\n"}})
    journal, known = started(file)
    assert known == {"y"}
    with pytest.raises(ValueError, match="must cover exactly the 3 samples, got 2 missing"):
        journal.finish()
    assert not file.exists()
    journal, known = started(file)
    journal.add({"z": ROW, "x": ROW})
    rows = journal.finish()
    assert [row["text"] for row in rows] == ["a", "ü\n", "a"]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines == [{"question_id": n, "text": t} for n, t in (("x", "a"), ("y", "ü\n"), ("z", "a"))]
    assert started(file)[1] == {"x", "y", "z"}
    remove_parts(file.parent)
    assert list(file.parent.iterdir()) == [file]


def test_cut_lines_other_states_and_other_samples_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / "01.jsonl"
    journal, _ = started(file)
    journal.add({"x": ROW})
    journal.add({"y": ROW})
    whole = part(file).read_bytes()
    for cut in range(len(whole)):
        part(file).write_bytes(whole[:cut])
        header, first = whole.index(b"\n") + 1, whole.index(b"\n", whole.index(b"\n") + 1) + 1
        assert started(file)[1] == (set() if cut < max(first, header) else {"x"}), cut
    part(file).write_bytes(whole + b'{"question_id": "w", "text": "", "group": 0, "gates": null}\n')
    assert started(file)[1] == {"x", "y"}
    assert started(file, "another")[1] == set()


def test_a_killed_evaluation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = runs.learner(tmp_path / "run", eval_batch_size=2)
    made.learn(0)
    made.learn(1)
    whole, run = Path(shutil.copytree(tmp_path / "run", tmp_path / "whole")), tmp_path / "run"
    batches: list[list[int]] = []
    real = answers.generate_answers

    def counted(*arguments: Any, made: Any, **options: Any) -> Any:
        def keep(indices: list[int], texts: list[str]) -> None:
            batches.append(indices)
            made(indices, texts)
            if len(batches) == 4:
                raise Cut

        return real(*arguments, made=keep, **options)

    def evaluate(folder: Path) -> dict[str, float]:
        model, encoder = factories.fresh()
        return evaluate_run(
            folder, runs.two_tasks(), model, factories.llava_processor(), encoder, progress=False
        )

    expected = evaluate(whole)
    monkeypatch.setattr(answers, "generate_answers", counted)
    with pytest.raises(Cut):
        evaluate(run)
    assert evaluate(run) == expected
    assert len(batches) == 6  # Three batches of five samples for each of two tasks, none twice.
    assert results(run) == results(whole)
    for name in ("colour", "letter"):
        left, right = (
            json.loads((folder / "eval/toy/result.json").read_text())["routing"][name]
            for folder in (run, whole)
        )
        assert left == right
    assert timeless({"methods": {}}) == {"methods": {}}
