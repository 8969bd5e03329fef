"""The built-in stream: six small tasks with different pictures and answer formats, drawn from a seed."""

from __future__ import annotations

import numpy as np

from cram.streams.builtin.tasks import TASKS, BuiltinTask
from cram.streams.types import Sample, Stream, Task

TRAIN_SAMPLES = 1280
TEST_SAMPLES = 256
_SPLITS = ("train", "test")


def build(seed: int = 0, train_samples: int = TRAIN_SAMPLES, test_samples: int = TEST_SAMPLES) -> Stream:
    """Draw the built-in stream.

    Args:
        seed: Decides every picture and question; the same seed gives the same stream.
        train_samples: Training samples a task.
        test_samples: Test samples a task; none of them occurs in the training split.

    Raises:
        ValueError: If a sample count is not positive.
    """
    for name, value in (("train_samples", train_samples), ("test_samples", test_samples)):
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value}")
    return Stream(
        "builtin",
        tuple(_build_task(task, i, seed, train_samples, test_samples) for i, task in enumerate(TASKS)),
    )


def _build_task(task: BuiltinTask, index: int, seed: int, train_samples: int, test_samples: int) -> Task:
    seen: set[tuple[bytes, str]] = set()
    train = _draw_split(task, index, seed, "train", train_samples, seen)
    test = _draw_split(task, index, seed, "test", test_samples, seen)
    return Task(task.name, train, test, task.scorer, task.max_new_tokens)


def _draw_split(
    task: BuiltinTask, index: int, seed: int, split: str, count: int, seen: set[tuple[bytes, str]]
) -> tuple[Sample, ...]:
    """Draw `count` samples whose picture and question are not in `seen`, and add them to it."""
    rng = np.random.default_rng([seed, index, _SPLITS.index(split)])
    samples: list[Sample] = []
    while len(samples) < count:
        image, instruction, answer = task.draw(rng, split)
        key = (image.tobytes(), instruction)
        if key not in seen:
            seen.add(key)
            samples.append(Sample(f"{task.name}-{split}-{len(samples):05d}", (image,), instruction, answer))
    return tuple(samples)
