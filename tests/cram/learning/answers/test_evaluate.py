"""A test of the newest state: what it prints and keeps of accuracies and published rules."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cram.atomic import read_json
from cram.learning.answers import evaluate
from cram.learning.answers.generate import Published, TaskResult, published_line
from cram.streams.types import Stream
from tests.cram import factories, runs


@pytest.mark.parametrize("progress", [True, False])
def test_published_accuracies_are_printed_and_kept(
    progress: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.learner(tmp_path, "sequential", max_steps=2).learn(0)
    found: Published = {"rule": "mcitlib_accuracy", "accuracy": 50.0, "difference": 10.0}

    def tested(
        model: Any, processor: Any, method: Any, task: Any, split: Any, file: Path, *_: Any
    ) -> TaskResult:
        file.parent.mkdir(parents=True, exist_ok=True)
        return TaskResult(40.0, None, found if task.name == "letter" else None)

    monkeypatch.setattr(evaluate, "run_test", tested)
    model, encoder = factories.fresh()
    processor = factories.llava_processor()
    evaluate.evaluate_run(tmp_path, runs.two_tasks(), model, processor, encoder, progress)
    lines = [f"{name:24}  40.00" for name in ("colour", "letter")] + [published_line("letter", found)]
    assert capsys.readouterr().out.splitlines() == (lines if progress else [])
    record = read_json(tmp_path / "eval/toy/result.json")
    assert record["accuracies"] == {"colour": 40.0, "letter": 40.0}
    assert record["published"] == {"letter": found} and record["routing"] == {}


def test_a_result_of_other_samples_is_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.learner(tmp_path, "sequential", max_steps=2).learn(0)

    def answered(*arguments: Any) -> TaskResult:
        arguments[5].parent.mkdir(parents=True, exist_ok=True)
        return TaskResult(40.0, None, None)

    monkeypatch.setattr(evaluate, "run_test", answered)

    def tested(stream: Stream) -> Any:
        model, encoder = factories.fresh()
        evaluate.evaluate_run(tmp_path, stream, model, factories.llava_processor(), encoder, False)
        return read_json(tmp_path / "eval/toy/result.json")["tested"]

    one, two = runs.two_tasks().tasks
    assert list(tested(Stream("toy", (one,)))) == ["colour"]
    found = tested(runs.two_tasks())
    assert found["letter"]["samples"] == len(two.test)
    fewer = Stream("toy", (one, replace(two, test=two.test[:1])))
    with pytest.raises(ValueError, match=r"got that of others for \['letter'\]; move it away"):
        tested(fewer)
    assert tested(runs.two_tasks()) == found
    for name in ("..", "a/b", ""):
        with pytest.raises(ValueError, match="name of the stream must be one of a folder"):
            tested(Stream(name, (one,)))
