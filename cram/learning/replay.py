"""Samples of older tasks that a later task sees again, for methods that keep data."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cram.learning.schedule import task_seed
from cram.streams.types import Sample, Stream


def training_samples(stream: Stream, index: int, kept: int, seed: int) -> Sequence[Sample]:
    """Return the training samples of a task, and behind them what is kept of the tasks before it.

    Args:
        stream: The stream.
        index: Number of the task.
        kept: Samples that are kept at most, the same number of every task but the last; 0 for none.
        seed: Decides which ones, together with their task.
    """
    own = stream.tasks[index].train
    return [*own, *_kept(stream, index, kept, seed)] if kept and index else own


def all_kept_samples(stream: Stream, kept: int, seed: int) -> list[Sample]:
    """Return what is kept when the last task is trained."""
    return _kept(stream, len(stream.tasks) - 1, kept, seed)


def _kept(stream: Stream, tasks: int, kept: int, seed: int) -> list[Sample]:
    """What is kept of the first so many tasks, in the tasks' own order."""
    found: list[Sample] = []
    for index, task in enumerate(stream.tasks[:tasks]):
        room = max(1, kept // (len(stream.tasks) - 1))
        generator = torch.Generator().manual_seed(task_seed(seed, index))
        chosen = torch.randperm(len(task.train), generator=generator)[:room]
        found += [task.train[number] for number in sorted(chosen.tolist())]
    return found
