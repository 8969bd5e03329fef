"""What a continual-learning method decides; everything else is the learner's and the expert layer's.

For each task the learner calls, in this order:

    begin_task(task, total_steps)
    for every step:  before_step(step)      parameters for a fresh optimiser where a stage begins, else None
                     forward and loss       routed by queries, or under the fixed `gates`
                     extra_loss()           added to the cross-entropy
    end_task()

A method keeps no state of its own between tasks: experts, centroids and groups live in the `Cram`, so the
bundle saves every method, and a run goes on from the bundle alone.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from cram.attach import Cram
from cram.peft_folder import Factors
from cram.routing import Query


class Method:
    """A method without routing by content: the base of the others.

    Attributes:
        name: Name in the registry and in reports.
        routed: Whether gates come from queries (features of the sample); if not, from `gates`.
    """

    name: ClassVar[str]
    routed: ClassVar[bool] = False

    def __init__(self, cram: Cram) -> None:
        self.cram = cram
        self.config = cram.config

    def begin_task(self, task: str, total_steps: int) -> None:
        """Prepare the experts for a new task."""
        raise NotImplementedError

    def before_step(self, step: int) -> list[nn.Parameter] | None:
        """Parameters that a fresh optimiser trains from this step on, or None to go on as before."""
        return expert_parameters(self.cram) if step == 0 else None

    def observe(self, query: Query) -> None:
        """See the query of a training batch before it is routed."""

    def extra_loss(self) -> Tensor | None:
        """What is added to the cross-entropy of the last forward."""
        return None

    def end_task(self) -> None:
        """Freeze what the task has trained."""
        self.cram.freeze()

    def gates(self, task: str) -> Tensor | None:
        """Gates [E] for every sample of a task; None where queries decide."""
        return None


def expert_parameters(cram: Cram) -> list[nn.Parameter]:
    """The factors in training, without a centroid."""
    return [parameter for module in cram.modules.values() for parameter in module.trainable()]


def new_lora(cram: Cram, rank: int) -> dict[str, Factors]:
    """A fresh LoRA of one rank per module: A [r, D_in] kaiming-uniform with a = sqrt 5, B [D_out, r] zero."""
    factors = {}
    for name, module in cram.modules.items():
        kept = min(rank, module.in_features, module.out_features)
        a = torch.empty(kept, module.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        factors[name] = (a, torch.zeros(module.out_features, kept))
    return factors


def no_centroid(cram: Cram) -> Tensor:
    """The centroid [D_q] of an expert that no query is compared with."""
    return torch.zeros(cram.encoder.image_dim)
