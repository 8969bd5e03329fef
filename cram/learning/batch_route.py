"""The route of a batch. Training and evaluation use the same rule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cram.learning.batches import EncodedSplit
from cram.methods import Method


@contextmanager
def batch_route(
    model: Any, method: Method, task: str, split: EncodedSplit, indices: list[int]
) -> Iterator[None]:
    """Route a batch inside the context: by the forward, by an explicit query, or by the method's gates."""
    cram = method.cram
    if method.told_task:
        route: Any = method.gates(task)
    elif cram.encoder.reuses_vision_tower or not method.uses_queries:
        yield
        return
    else:
        query = split.query(indices, cram.encode)
        if model.training:
            method.observe(query)
        route = method.route(query, model.training)
    with cram.fixed(route):
        yield
