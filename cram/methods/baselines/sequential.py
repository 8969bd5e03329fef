"""Sequential LoRA, the lower bound: one LoRA of rank `rank` that every task trains further."""

from __future__ import annotations

from cram.methods.base import Method
from cram.model.factors import new_lora

EXPERT = "sequential"


class SequentialMethod(Method):
    """The first task starts the LoRA. Every later task trains the same LoRA further."""

    name = "sequential"
    pool = (EXPERT,)
    budget = "one"

    def begin_task(self, task: str, total_steps: int) -> None:
        """Train the LoRA: a new one in the first task, later the one of the last task."""
        fresh = new_lora(self.cram.modules, self.config.rank)
        weights = self.cram.expert_weights(0) if self.cram.num_experts else fresh
        self.cram.set_experts(self.pool, [weights], trained=1)
