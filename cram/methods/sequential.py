"""Sequential LoRA, the lower bound: one LoRA of rank `rank` that every task trains further."""

from __future__ import annotations

from cram.methods.base import Method
from cram.model.factors import new_lora

EXPERT = "sequential"


class SequentialMethod(Method):
    """The first task starts the LoRA, every other one takes it up again."""

    name = "sequential"
    budget = "one"

    def begin_task(self, task: str, total_steps: int) -> None:
        """Put the LoRA, new or as the last task left it, into training."""
        fresh = new_lora(self.cram.modules, self.config.rank)
        weights = self.cram.expert_weights(0) if self.cram.num_experts else fresh
        self.cram.set_experts([EXPERT], [weights], trained=1)
