"""What a continual-learning method decides; everything else is the learner's and the expert layer's.

For each task the learner calls, in this order:

    begin_task(task, total_steps)
    for every step:  before_step(step)      parameters for a fresh optimiser where a stage begins, else None
                     observe(query)         only where the method uses queries
                     forward and loss       under `route` (under `gates` where the method is told the task)
                     extra_loss()           added to the cross-entropy
    end_task()

`model.cram.method` routes every forward, also a plain `model.generate`. What a method must know after a task
lives in the `Cram` (experts, centroids, groups), in the gatings of its modules or in `state`: bundles hold
these, and a run goes on from the bundle alone. Initial values are drawn in `begin_task`, which is seeded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from cram.routing.query import Query, Route

if TYPE_CHECKING:
    from cram.attach import Cram
    from cram.methods.parts.projector import MixedProjector

Factors = tuple[Tensor, Tensor]


class Method:
    """Base of the methods: every expert acts on every sample, with gate 1.

    Attributes:
        name: Name in the registry and in reports.
        told_task: Whether evaluation tells it the true task (`gates`); such a method cannot route by itself.
        uses_queries: Whether it needs the features of the samples, in `route` or `observe`.
        routed: Whether each task owns one expert in an instruction group, among which queries choose; reports
            then tell groups, ranks and how samples were routed.
        budget: How its rank is chosen where methods are compared, a kind in `cram.compare.entries.BUDGETS`.
    """

    name: ClassVar[str]
    told_task: ClassVar[bool] = False
    uses_queries: ClassVar[bool] = False
    routed: ClassVar[bool] = False
    budget: ClassVar[str] = "task"

    def __init__(self, cram: Cram) -> None:
        """Binds the method to an attached model without experts; may install gatings."""
        self.cram = cram
        self.config = cram.config

    def begin_task(self, task: str, total_steps: int) -> None:
        """Prepare the experts for a new task."""
        raise NotImplementedError

    def before_step(self, step: int) -> list[nn.Parameter] | None:
        """Parameters that a fresh optimiser trains from this step on, or None to go on as before."""
        return trainable_parameters(self.cram) if step == 0 else None

    def observe(self, query: Query) -> None:
        """See the query of a training batch before it is routed."""

    def extra_loss(self) -> Tensor | None:
        """What is added to the cross-entropy of the last forward."""
        return None

    def end_task(self) -> None:
        """Freeze what the task has trained."""
        self.cram.freeze()

    def route(self, query: Query | None, training: bool) -> Route:
        """Gates [L, S, E] and groups [S] of a prefill or training forward; S = 1 serves all rows.

        Args:
            query: Features of S samples; may be None unless the method uses queries.
            training: Whether the model is in training mode.
        """
        return uniform_route(self.cram)

    def gates(self, task: str) -> Tensor:
        """Gates [E] for every sample of a task, where the method is told the task."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """What a bundle keeps of the method beside experts and router: finite float32 tensors by name.

        By default the state of the gatings, named "<module path>.<key>".
        """
        return {
            f"{path}.{key}": tensor
            for path, module in self.cram.modules.items()
            if module.gating is not None
            for key, tensor in module.gating.state_dict().items()
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up a bundle's state once its experts are there; also called with none. Rebuilds derived data.

        Raises:
            ValueError: If names or shapes are not those of `state`; nothing is changed then.
        """
        own = self.state()
        check_state(tensors, {name: tuple(tensor.shape) for name, tensor in own.items()})
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])

    def trained_values(self) -> int:
        """Trained values that stay in use beside factors and centroids: by default those of the gatings."""
        gatings = (module.gating for module in self.cram.modules.values() if module.gating is not None)
        return sum(parameter.numel() for gating in gatings for parameter in gating.parameters())

    def release(self) -> None:
        """Take out of the model what the method has put there beside the adapted linears' own parts."""


def check_state(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare a stored state with what a method expects.

    Raises:
        ValueError: If a name is missing or unknown, or a shape differs.
    """
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found.keys() != shapes.keys():
        raise ValueError(
            f"method state must have {len(shapes)} tensors, got "
            f"missing {sorted(shapes.keys() - found.keys())[:8]}, "
            f"unexpected {sorted(found.keys() - shapes.keys())[:8]}"
        )
    for name, shape in shapes.items():
        if found[name] != shape:
            raise ValueError(f"method state {name} must have shape {list(shape)}, got {list(found[name])}")


def uniform_route(cram: Cram) -> Route:
    """Gate 1 for every expert, for all rows: gates [L, 1, E]."""
    gates = torch.ones(cram.router.num_layers, 1, cram.num_experts)
    return Route(gates, torch.full((1,), -1))


def trainable_parameters(cram: Cram) -> list[nn.Parameter]:
    """What an optimiser gets: factors in training, gating parameters that require grad, the centroid."""
    return cram.trainable_parameters()


def new_lora(owner: Cram | MixedProjector, rank: int) -> dict[str, Factors]:
    """A fresh LoRA of one rank per module: A [r, D_in] kaiming-uniform with a = sqrt 5, B [D_out, r] zero."""
    factors = {}
    for name, module in owner.modules.items():
        kept = min(rank, module.in_features, module.out_features)
        a = torch.empty(kept, module.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        factors[name] = (a, torch.zeros(module.out_features, kept))
    return factors
