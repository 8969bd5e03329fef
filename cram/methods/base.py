"""What a continual-learning method decides; everything else is the learner's and the expert layer's.

For each task the learner calls, in this order:

    begin_task(task, total_steps)
    for every step:  before_step(step)      parameters for a fresh optimiser where a stage begins, else None
                     observe(query)         only where the method uses queries
                     forward and loss       under `route` (under `gates` where the method is told the task)
                     extra_loss(state)      added to the cross-entropy of the forward with that state
    end_task()

`model.cram.method` routes every forward, also a plain `model.generate`. What a method must know after a task
lives in the experts, in the gatings of its modules or in `export_state`. Bundles hold these, and a run goes
on from the bundle alone. Initial values are drawn in `begin_task`, which is seeded.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from cram.model.attached import AttachedModel
from cram.model.state import ForwardState
from cram.routing.query import Query, Route


class MethodState(NamedTuple):
    """What a bundle keeps of a method beside the experts.

    Attributes:
        tensors: Finite float32 tensors by name.
        values: JSON values by name.
    """

    tensors: dict[str, Tensor]
    values: dict[str, Any]


class Method:
    """Base of the methods: every expert acts on every sample, with gate 1.

    Attributes:
        name: Name in the registry and in reports.
        told_task: Whether evaluation tells it the true task (`gates`); such a method cannot route by itself.
        uses_queries: Whether it needs the features of the samples, in `route` or `observe`.
        budget: How its rank is chosen where methods are compared, a kind in `cram.compare.entries.BUDGETS`.
    """

    name: ClassVar[str]
    told_task: ClassVar[bool] = False
    uses_queries: bool = False
    budget: ClassVar[str] = "task"

    def __init__(self, cram: AttachedModel) -> None:
        """Binds the method to an attached model without experts; may install gatings."""
        self.cram = cram
        self.config = cram.config

    @property
    def wants_visual_means(self) -> bool:
        """Whether the loss needs the visual-token means of the linears' inputs, `ForwardState.hidden`."""
        return False

    def begin_task(self, task: str, total_steps: int) -> None:
        """Prepare the experts for a new task."""
        raise NotImplementedError

    def before_step(self, step: int) -> list[nn.Parameter] | None:
        """Parameters that a fresh optimiser trains from this step on, or None to go on as before."""
        return self.cram.trainable_parameters() if step == 0 else None

    def experts_replaced(self) -> None:
        """Forget what belonged to the experts before; called by `AttachedModel.set_experts`."""

    def extra_parameters(self) -> list[nn.Parameter]:
        """What the method trains beside factors and gatings."""
        return []

    def observe(self, query: Query) -> None:
        """See the query of a training batch before it is routed."""

    def extra_loss(self, state: ForwardState) -> Tensor | None:
        """What is added to the cross-entropy of the training forward with this state."""
        return None

    def end_task(self) -> None:
        """Freeze what the task has trained."""
        self.cram.freeze()

    def route(self, query: Query | None, training: bool) -> Route:
        """The route of a prefill or training forward, with gates [L, S, E]; S = 1 serves all rows.

        Args:
            query: Features of S samples; may be None unless the method uses queries.
            training: Whether the model is in training mode.
        """
        return uniform_route(self.cram)

    def gates(self, task: str) -> Tensor:
        """Gates [E] for every sample of a task, where the method is told the task."""
        raise NotImplementedError

    def export_state(self) -> MethodState:
        """What a bundle keeps of the method: by default its gatings' state, named "<module path>.<key>"."""
        tensors = {
            f"{path}.{key}": tensor
            for path, module in self.cram.modules.items()
            if module.gating is not None
            for key, tensor in module.gating.state_dict().items()
        }
        return MethodState(tensors, {})

    def import_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take up an exported state once the experts are there; also called with none. Rebuilds derived data.

        Raises:
            ValueError: If names or shapes are not those of `export_state`; nothing is changed then.
        """
        own = self.export_state().tensors
        check_state(tensors, {name: tuple(tensor.shape) for name, tensor in own.items()})
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])

    def expert_groups(self) -> dict[str, int]:
        """Expert -> its instruction group, where each task owns one expert among which queries choose.

        Reports then tell groups, ranks and how samples were routed; empty for other methods.
        """
        return {}

    def values_per_expert(self) -> int:
        """Trained values that every expert brings beside its factors."""
        return 0

    @classmethod
    def about(cls) -> str:
        """What the method is, in a sentence or two for a published page: the start of its module's text."""
        return " ".join((sys.modules[cls.__module__].__doc__ or "").split("\n\n")[0].split())

    def trained_values(self) -> int:
        """Trained values that stay in use beside the experts' factors: by default those of the gatings."""
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


def uniform_route(cram: AttachedModel) -> Route:
    """Gate 1 for every expert, for all rows: gates [L, 1, E]."""
    return Route(torch.ones(cram.num_layers, 1, cram.num_experts))
