"""Predictions as they are made: a stopped evaluation goes on, cut lines and other states are dropped."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cram.atomic import locked
from cram.learning.answers import generate as answers
from cram.learning.answers.evaluate import evaluate_run
from cram.learning.answers.journal import Journal, remove_parts
from cram.streams import Sample, Stream, Task
from tests.cram import factories, runs
from tests.cram.runs import results

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
    file = tmp_path / "p/q/01.jsonl"
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


def test_the_report_says_by_how_much_a_published_rule_differs() -> None:
    samples = [Sample("a", (), "q", "Up."), Sample("b", (), "q", "no")]
    task = Task("t", samples, samples, "accuracy", 3, "mcitlib_accuracy")
    found = answers.published_result(task, {"a": "up", "b": "NO"}, 100.0)
    assert found == {"rule": "mcitlib_accuracy", "accuracy": 50.0, "difference": -50.0}
    assert answers.published_line("t", found) == (
        "t: 50.00 by the published rule mcitlib_accuracy, -50.00 against the strict one"
    )
    assert answers.published_result(task, {"a": "UP.", "b": "no"}, 100.0) is None


def test_a_run_reports_published_accuracies(tmp_path: Path) -> None:
    plain = runs.two_tasks()
    # Every prediction is a part of the answer by position, or not: the rule of another benchmark.
    tasks = tuple(replace(task, published="mcitlib_imagenet") for task in plain.tasks)
    made = runs.learner(tmp_path / "run", tasks=Stream("toy", tasks))
    report = made.run()["methods"]["cram"]
    again = runs.learner(tmp_path / "run", tasks=Stream("toy", tasks)).run()["methods"]["cram"]
    assert report.get("published") == again.get("published")
    for name, each in report.get("published", {}).items():
        strict = report["matrix"][-1][[task.name for task in tasks].index(name)]
        assert each["accuracy"] - strict == pytest.approx(each["difference"])


def test_two_evaluations_do_not_write_one_folder(tmp_path: Path) -> None:
    runs.learner(tmp_path / "run").learn(0)
    model, encoder = factories.fresh()
    with locked(tmp_path / "run/eval/toy"), pytest.raises(ValueError, match="must have one writer"):
        one = Stream("toy", runs.two_tasks().tasks[:1])
        evaluate_run(tmp_path / "run", one, model, factories.llava_processor(), encoder, progress=False)
