"""Isolated LoRAs, the upper bound: a LoRA of rank `rank_max` a task, chosen by the true task at test time."""

from __future__ import annotations

import torch
from torch import Tensor

from cram.methods.method import Method, new_lora, no_centroid


class IsolatedMethod(Method):
    """Each task trains its own LoRA alone."""

    name = "isolated"

    def begin_task(self, task: str, total_steps: int) -> None:
        """Start the task's LoRA."""
        self.cram.add_expert(task, new_lora(self.cram, self.config.rank_max), 0, no_centroid(self.cram))

    def gates(self, task: str) -> Tensor | None:
        """One-hot gates [E] of the task's own LoRA.

        Raises:
            ValueError: If the task has not been learnt.
        """
        names = self.cram.router.expert_names
        if task not in names:
            raise ValueError(f"task must be one of the learnt ones {names}, got {task!r}")
        return torch.eye(len(names))[names.index(task)]
