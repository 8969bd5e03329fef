"""The built-in streams: small tasks with different pictures and answer formats, drawn from a seed.

The pictures of `builtin-real` are composed from collected ones (`cram.streams.real`); all others are drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cram.streams.builtin.long import TABLE, make_tasks
from cram.streams.builtin.tasks import TASKS
from cram.streams.made import BuiltinTask
from cram.streams.real.tasks import TASKS as REAL_TASKS
from cram.streams.types import Sample, Stream, Task

_SPLITS = ("train", "test")


@dataclass(frozen=True)
class BuiltinStream:
    """The tasks of a built-in stream in order, and the samples of each task's splits."""

    tasks: tuple[BuiltinTask, ...]
    train_samples: int
    test_samples: int


# After each task a run tests all tasks so far. So a longer stream has smaller splits.
STREAMS: dict[str, BuiltinStream] = {
    "builtin": BuiltinStream(TASKS, 1280, 256),
    "builtin-real": BuiltinStream(REAL_TASKS, 800, 200),
    "builtin-20": BuiltinStream(make_tasks(TABLE[:20]), 1024, 96),
    "builtin-50": BuiltinStream(make_tasks(TABLE), 1024, 96),
}


def build(
    seed: int = 0,
    train_samples: int | None = None,
    test_samples: int | None = None,
    name: str = "builtin",
) -> Stream:
    """Draw a built-in stream.

    Args:
        seed: Decides every picture and question. The same seed gives the same stream.
        train_samples: Training samples per task. None stands for the stream's own size.
        test_samples: Test samples per task, None as above. No test sample occurs in the training split.
        name: A name in `STREAMS`.

    Raises:
        ValueError: If the name is unknown or a sample count is not positive.
    """
    if name not in STREAMS:
        raise ValueError(f"name must be one of {sorted(STREAMS)}, got {name!r}")
    stream = STREAMS[name]
    train = stream.train_samples if train_samples is None else train_samples
    test = stream.test_samples if test_samples is None else test_samples
    for what, value in (("train_samples", train), ("test_samples", test)):
        if value < 1:
            raise ValueError(f"{what} must be positive, got {value}")
    return Stream(name, tuple(_build_task(task, seed, train, test) for task in stream.tasks))


def _build_task(task: BuiltinTask, seed: int, train_samples: int, test_samples: int) -> Task:
    seen: set[tuple[bytes, str]] = set()
    train = _draw_split(task, seed, "train", train_samples, seen)
    test = _draw_split(task, seed, "test", test_samples, seen)
    return Task(task.name, train, test, task.scorer, task.max_new_tokens)


def _draw_split(
    task: BuiltinTask, seed: int, split: str, count: int, seen: set[tuple[bytes, str]]
) -> tuple[Sample, ...]:
    """Draw `count` samples whose picture and question are not in `seen`, and add them to it."""
    rng = np.random.default_rng([seed, task.key, _SPLITS.index(split)])
    samples: list[Sample] = []
    while len(samples) < count:
        image, instruction, answer = task.draw(rng, split)
        key = (image.tobytes(), instruction)
        if key not in seen:
            seen.add(key)
            samples.append(Sample(f"{task.name}-{split}-{len(samples):05d}", (image,), instruction, answer))
    return tuple(samples)
