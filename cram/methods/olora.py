"""O-LoRA (arXiv 2310.14152): one LoRA per task, whose A is kept orthogonal to older A. All LoRAs add up.

    loss = cross-entropy + overlap_weight * sum over modules of sum_ij |A_old A_new^T|_ij

Faithful to the released code: the added loss is an entrywise sum of magnitudes, not a squared norm. It runs
over the frozen A of all older tasks. Every task has gate 1 at test time. The released code can also penalise
the norms of the new factors. The weight of that term is 0 in the paper's runs, so this file has no such term.

Own reading: target linears, scale and dropout are the configuration's, and each LoRA has rank `rank`. The
released code weighs the penalty by 0.5, the default; its public ports to LLaVA have 0.05 or 0.5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cram.methods.base import Method
from cram.model.factors import new_lora
from cram.model.state import ForwardState


class OLoraMethod(Method):
    """Each task trains its own LoRA beside the older, frozen ones."""

    name = "olora"

    def begin_task(self, task: str, total_steps: int) -> None:
        """Start the task's LoRA."""
        self.cram.add_expert(task, new_lora(self.cram.modules, self.config.rank))

    def extra_loss(self, state: ForwardState) -> Tensor | None:
        """Return the weighted overlap of the new A with the older A, or None in the first task."""
        if self.cram.num_experts < 2:
            return None
        terms = []
        for module in self.cram.modules.values():
            experts = module.experts
            assert experts is not None and experts.trained_a is not None
            older = experts.a[: experts.total_rank - experts.trained_rank]
            terms.append(overlap(older, experts.trained_a))
        return self.config.overlap_weight * torch.stack(terms).sum()


def overlap(older: Tensor, new: Tensor) -> Tensor:
    """Return sum_ij |older new^T|_ij of the rows older [R, D_in] and new [r, D_in], a scalar."""
    return (older @ new.mT).abs().sum()
