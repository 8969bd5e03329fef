"""Sequential LoRA, the lower bound: one LoRA of rank `rank_max` that every task trains further."""

from __future__ import annotations

import torch
from torch import Tensor

from cram.attach import Cram
from cram.bundle import expert_weights
from cram.methods.method import Method, new_lora, no_centroid

EXPERT = "sequential"


class SequentialMethod(Method):
    """The first task starts the LoRA, every other one takes it up again."""

    name = "sequential"

    def begin_task(self, task: str, total_steps: int) -> None:
        """Put the LoRA, new or as the last task left it, into training."""
        weights = new_lora(self.cram, self.config.rank_max)
        if self.cram.num_experts:
            weights = expert_weights(self.cram, 0)
            _remove_experts(self.cram)
        self.cram.add_expert(EXPERT, weights, 0, no_centroid(self.cram))

    def gates(self, task: str) -> Tensor | None:
        """Gate 1, shape [1]."""
        return torch.ones(1)


def _remove_experts(cram: Cram) -> None:
    for module in cram.modules.values():
        module.experts = None
    tensors, values = cram.router.groups.export_state()
    tensors["centroids"] = torch.zeros(cram.router.num_layers, 0, 0)
    cram.router.import_state(tensors, {**values, "experts": []})
