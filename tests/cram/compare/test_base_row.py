"""The row of the untrained base: its answers, measured once, beside those of the trained model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cram.compare import base_row
from cram.compare.base_row import measure_base
from cram.learning.answers.predict import Turn, answer_all
from cram.streams import Stream
from tests.cram import factories, runs


def test_the_base_answers_without_experts_and_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = runs.learner(tmp_path / "run", tasks=runs.two_tasks())
    cram = learner.cram
    cram.add_expert("loud", factories.expert_weights(cram, 3), trained=False)
    found = measure_base(learner, tmp_path / "base")
    assert list(found) == [task.name for task in learner.stream.tasks]
    written = {}
    for index, task in enumerate(learner.stream.tasks):
        file = tmp_path / f"base/predictions/{index + 1:02d}-{task.name}.jsonl"
        written[task.name] = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    monkeypatch.setattr(base_row, "generate_answers", None)
    assert measure_base(learner, tmp_path / "base") == found
    bare = runs.learner(tmp_path / "bare")
    for task in bare.stream.tasks:
        turns = [[Turn.of(sample.instruction, list(sample.images))] for sample in task.test]
        expected = [str(each) for each in answer_all(bare.model, turns, max_new_tokens=task.max_new_tokens)]
        assert written[task.name] == expected


def test_a_stopped_test_of_the_base_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = runs.learner(tmp_path / "run", tasks=runs.two_tasks())
    whole = measure_base(learner, tmp_path / "whole")
    answer, asked = base_row.generate_answers, []

    def cut(*arguments: Any, batches: Any, **options: Any) -> None:
        asked.append(sum(map(len, batches)))
        if len(asked) == 2:
            raise KeyboardInterrupt
        answer(*arguments, batches=batches, **options)

    monkeypatch.setattr(base_row, "generate_answers", cut)
    with pytest.raises(KeyboardInterrupt):
        measure_base(learner, tmp_path / "base")
    assert measure_base(learner, tmp_path / "base") == whole
    assert asked == [asked[0], asked[1], 0, asked[1]]


def test_answers_to_other_samples_are_refused(tmp_path: Path) -> None:
    measure_base(runs.learner(tmp_path / "run"), tmp_path / "base")
    tasks = runs.two_tasks().tasks
    fewer = Stream("toy", (replace(tasks[0], test=tasks[0].test[:1]), *tasks[1:]))
    with pytest.raises(ValueError, match="answers to this stream, got those of another base or stream"):
        measure_base(runs.learner(tmp_path / "other", tasks=fewer), tmp_path / "base")
