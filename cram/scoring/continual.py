"""Continual-learning metrics over the lower-triangular accuracy matrix a[t][i].

a[t][i] is the accuracy on task i after task t was trained. Row t has the columns 0..t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

DEFINITIONS = {
    "last": "Last = mean over tasks i of a[T][i]: the accuracy on every task after the last one was learnt.",
    "avg": "Avg = mean over t of the mean over i ≤ t of a[t][i]: the accuracy on all tasks learnt so far, "
    "averaged over the stream.",
    "mft": "MFT = mean over i of a[i][i]: the accuracy on each task right after it was learnt.",
    "bwt": "BWT = mean over i < T of a[T][i] − a[i][i]: what later tasks changed (negative: forgetting).",
    "forgetting": "Forgetting = mean over i < T of max over t < T of a[t][i], minus a[T][i]: how far each "
    "task fell from its best earlier accuracy (lower is better).",
}


@dataclass(frozen=True)
class ContinualMetrics:
    """The five numbers of one run. `DEFINITIONS` explains each number in words."""

    last: float
    avg: float
    mft: float
    bwt: float
    forgetting: float

    def to_dict(self) -> dict[str, float]:
        """Return the numbers as plain data, in the order of `DEFINITIONS`."""
        return asdict(self)


def continual_metrics(matrix: Sequence[Sequence[float]]) -> ContinualMetrics:
    """Last, Avg, MFT, BWT and Forgetting of a lower-triangular accuracy matrix.

    Forgetting takes the maximum over the steps BEFORE the last step. So a task that improves in the last step
    gives a negative value. (The Mammoth library takes the maximum over all steps and reports 0 for such a
    task.) BWT and Forgetting of a single task are 0.

    Args:
        matrix: T rows. Row t holds a[t][0..t] and no further column, because later tasks are not learnt yet.

    Raises:
        ValueError: If the matrix is empty or a row t does not have t + 1 columns.
    """
    rows = [list(row) for row in matrix]
    lengths = [len(row) for row in rows]
    if not rows or lengths != list(range(1, len(rows) + 1)):
        raise ValueError(f"matrix must have rows of 1, 2, ..., T accuracies, got row lengths {lengths}")
    final, learnt = rows[-1], range(len(rows) - 1)
    best = [max(row[i] for row in rows[i:-1]) for i in learnt]
    return ContinualMetrics(
        last=_mean(final),
        avg=_mean([_mean(row) for row in rows]),
        mft=_mean([row[-1] for row in rows]),
        bwt=_mean([final[i] - rows[i][i] for i in learnt]),
        forgetting=_mean([best[i] - final[i] for i in learnt]),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
