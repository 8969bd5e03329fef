"""Isolated LoRAs, the upper bound: one LoRA of rank `rank` per task, chosen by the true task at test time."""

from __future__ import annotations

import torch
from torch import Tensor

from cram.methods.base import Method
from cram.model.factors import new_lora
from cram.routing.query import Query, Route


class IsolatedMethod(Method):
    """Each task trains its own LoRA alone."""

    name = "isolated"
    told_task = True

    def begin_task(self, task: str, total_steps: int) -> None:
        """Start the task's LoRA."""
        self.cram.add_expert(task, new_lora(self.cram.modules, self.config.rank))

    def route(self, query: Query | None, training: bool) -> Route:
        """Refuse to route: a sample does not tell its task.

        Raises:
            ValueError: Always.
        """
        names = self.cram.expert_names
        raise ValueError(
            f"isolated must be told the task, got none: use `with model.cram.forced(task)`, one of {names}"
        )

    def gates(self, task: str) -> Tensor:
        """Return the one-hot gates [E] of the task's own LoRA.

        Raises:
            ValueError: If the task has not been learnt.
        """
        names = self.cram.expert_names
        if task not in names:
            raise ValueError(f"task must be one of the learnt ones {names}, got {task!r}")
        return torch.eye(len(names))[names.index(task)]
