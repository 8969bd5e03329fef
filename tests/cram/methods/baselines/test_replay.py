"""Replay-LoRA: which samples are kept, and that later tasks train on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cram.learning import learner as learning
from cram.learning.replay import all_kept_samples, training_samples
from cram.learning.schedule import task_seed
from cram.methods.baselines.replay import ReplayMethod
from cram.streams.types import Sample, Stream
from tests.cram import runs


def long_stream() -> Stream:
    """Three tasks of 100 training samples."""
    tasks = runs.stream().tasks
    return Stream(
        "long",
        tuple(
            replace(task, train=tuple(replace(task.train[0], id=f"{task.name}-{i}") for i in range(100)))
            for task in tasks
        ),
    )


def ids(samples: Any) -> list[str]:
    return [sample.id for sample in samples]


def test_every_task_but_the_last_keeps_the_same_number() -> None:
    stream = long_stream()
    first, second, third = (training_samples(stream, index, 60, seed=3) for index in range(3))
    assert first is stream.tasks[0].train
    assert ids(second[:100]) == ids(stream.tasks[1].train) and len(second) == 130
    assert len(third) == 160 and ids(third[100:130]) == ids(second[100:])
    kept = ids(third[100:])
    assert len(set(kept)) == 60 and kept[:30] == sorted(kept[:30], key=lambda name: int(name.split("-")[1]))
    assert ids(all_kept_samples(stream, 60, seed=3)) == kept
    assert ids(training_samples(stream, 1, 60, seed=4)[100:]) != kept[:30]
    # Each task's own seed draws what is kept of it, whatever the number of later tasks.
    for index in (0, 1):
        generator = torch.Generator().manual_seed(task_seed(3, index))
        drawn = sorted(torch.randperm(100, generator=generator)[:30].tolist())
        task = stream.tasks[index]
        assert kept[30 * index : 30 * index + 30] == [f"{task.name}-{number}" for number in drawn]
    assert training_samples(stream, 2, 0, seed=3) is stream.tasks[2].train


def test_a_small_task_keeps_all_it_has() -> None:
    stream = runs.two_tasks()
    assert ids(training_samples(stream, 1, 180, seed=0)) == [
        *ids(stream.tasks[1].train),
        *ids(stream.tasks[0].train),
    ]


@pytest.mark.parametrize(("method", "room"), [("replay", ReplayMethod.kept_samples), ("sequential", 0)])
def test_the_learner_trains_on_what_is_kept(
    method: str, room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[Sample]] = []
    encoded = learning.EncodedSplit

    def recorded(processor: Any, samples: Any, budget: Any) -> Any:
        seen.append(list(samples))
        return encoded(processor, samples, budget)

    made = runs.learner(tmp_path, method, max_steps=None, epochs=1)
    monkeypatch.setattr(learning, "EncodedSplit", recorded)
    for index in range(2):
        made.learn(index)
    assert [ids(samples) for samples in seen] == [
        ids(training_samples(made.stream, index, room, made.config.seed)) for index in range(2)
    ]
    assert made.cram.expert_names == [method]
