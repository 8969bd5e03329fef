"""The route of a batch. Training and evaluation use the same rule."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from cram.methods import Method


def batch_route(method: Method, task: str) -> AbstractContextManager[Any]:
    """By the gates of the task where the method is told the task, else by each forward's own inputs.

    Queries of training and of generation are then read in one way, so that centroids and queries agree.
    """
    return method.cram.fixed(method.gates(task)) if method.told_task else nullcontext()
