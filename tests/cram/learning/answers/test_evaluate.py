"""A test of the newest state: what it prints and keeps of accuracies and published rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cram.atomic import read_json
from cram.learning.answers import evaluate
from cram.learning.answers.generate import Published, TaskResult, published_line
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
