"""The training of one task, step by step, whoever runs the loop: `train_task` or transformers' Trainer.

    steps = TaskSteps(method, task)
    steps.begin(total)
    for every step:
        steps.stage(step)              the parameters of a new stage, else None
        with steps.forward():          every forward of the step; it is routed and its query is kept
            loss = ...
        loss + steps.added(share)      the method's own loss of this forward, times its share of the step
        backward, sum of the gradients over the processes, update
        steps.finish()                 the method observes the queries of the whole step
    steps.end()

A step may run several forwards (gradient accumulation) in several processes. The method's loss is a function
of each forward's own state. What the method observes is the step's whole batch. So the same samples give the
same training, however they are divided.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from cram.learning.parallel.processes import copy_from_first, gathered_rows
from cram.methods import Method
from cram.routing.means import without_autocast
from cram.routing.query import Query, Route


class TaskSteps:
    """One task in training.

    Attributes:
        method: The method.
        task: Name of the task.
        parameters: What is trained in the present stage.
    """

    def __init__(self, method: Method, task: str) -> None:
        """Binds method and task; nothing begins."""
        self.method, self.task = method, task
        self.parameters: list[nn.Parameter] = []
        self._seen: list[Query] = []

    def begin(self, total_steps: int) -> None:
        """Begin the task. Initial values come from torch's generator, which the caller seeds."""
        self.method.begin_task(self.task, total_steps)

    def stage(self, step: int) -> list[nn.Parameter] | None:
        """Return the parameters of a stage that begins at this step, the same in all processes; else None."""
        fresh = self.method.before_step(step)
        if fresh is not None:
            copy_from_first(fresh)
            self.parameters = fresh
        return fresh

    def resume(self) -> None:
        """Go on in the stage that the method has taken up from a checkpoint."""
        self.parameters = self.method.cram.trainable_parameters()

    @contextmanager
    def forward(self, counted: bool = True) -> Iterator[None]:
        """Route a training forward inside.

        Args:
            counted: False if the samples stand in for a process's empty share and must not be observed.
        """
        hooks, method = self.method.cram.hooks, self.method
        seen = self._seen if counted else []
        hooks.counted = counted
        if method.uses_queries:
            hooks.on_query.append(seen.append)
        try:
            with batch_route(method, self.task):
                yield
        finally:
            hooks.counted = True
            if method.uses_queries:
                hooks.on_query.pop()

    def added(self, share: float) -> Tensor | None:
        """Return the method's loss of the newest forward times the forward's share of the step, or None.

        Args:
            share: Samples of the forward / samples of the step in all processes.
        """
        with without_autocast(self.method.cram.device):
            extra = self.method.extra_loss(self.method.cram.state)
        return None if extra is None else extra if share == 1 else extra * share

    def finish(self) -> None:
        """Let the method observe the samples of the step, from all its forwards and processes."""
        if self.method.uses_queries:
            width = self.method.cram.encoder
            whole = _whole_query(self._seen, width.text_dim, width.image_dim, self.method.cram.device)
            self._seen.clear()
            self.method.observe(whole)

    def end(self) -> None:
        """End the task."""
        self.method.end_task()
        self.parameters = []


def batch_route(method: Method, task: str) -> AbstractContextManager[Any]:
    """By the gates of the task where the method is told the task, else by each forward's own inputs.

    Queries of training and of generation are then read in one way, so that centroids and queries agree.
    """
    return method.cram.fixed(method.gates(task)) if method.told_task else nullcontext()


def _whole_query(seen: list[Query], text_dim: int, image_dim: int, device: torch.device) -> Query:
    """The queries of a step's forwards in all processes, in one."""
    sides = {
        "text": torch.zeros(0, text_dim, device=device),
        "image": torch.zeros(0, image_dim, device=device),
        "has_image": torch.zeros(0, dtype=torch.bool, device=device),
    }
    parts = {
        name: [empty, *(getattr(query, name).to(device) for query in seen)] for name, empty in sides.items()
    }
    return Query(**{name: gathered_rows(torch.cat(rows)) for name, rows in parts.items()})


def gate_entropy(route: Route | None) -> Tensor | None:
    """Return the mean entropy of the gates over layers and samples, a scalar in nats; None without a route.

    The scalar stays where the gates are, so a GPU is not waited for.
    """
    if route is None or not route.gates.shape[2]:
        return None
    gates = route.gates.detach()
    return -torch.special.xlogy(gates, gates).sum(-1).mean()
