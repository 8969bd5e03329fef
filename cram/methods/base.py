"""What a continual-learning method decides. The learner and the expert layer do everything else.

For each task the learner calls, in this order:

    begin_task(task, total_steps)
    for every step:  before_step(step)      parameters for a fresh optimiser where a stage begins, else None
                     for every forward of the step, one or several:
                         forward and loss   under `route` (under `gates` where the method is told the task)
                         extra_loss(state)  added to the cross-entropy of the forward with that state
                     observe(query)         the step's samples; only where the method uses queries
    end_task()

`model.cram.method` routes every forward, also those of a plain `model.generate`. A method keeps what it must
know after a task in three places: the experts, the gatings of its modules, and `export_state`. A bundle holds
all three, and a run goes on from the bundle alone. A method draws initial values in `begin_task` only,
because the learner seeds that call. A checkpoint within a task holds `export_training` as well.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from cram.methods.parts.task.state import load_task_tensors, task_tensors
from cram.model.attached import AttachedModel
from cram.model.state import ForwardState
from cram.routing.means import CentroidMean
from cram.routing.query import Query, Route


class MethodState(NamedTuple):
    """The part of a method that a bundle keeps beside the experts.

    Attributes:
        tensors: Finite float32 tensors by name.
        values: JSON values by name.
    """

    tensors: dict[str, Tensor]
    values: dict[str, Any]


class Method:
    """Base of all methods. By default every expert acts on every sample with gate 1.

    Attributes:
        name: Name in the registry and in reports.
        told_task: True if evaluation tells the method the true task (`gates`). Such a method cannot route.
        uses_queries: True if `route` or `observe` needs the features of the samples.
        pool: Names of the experts where all tasks train one pool; None where every task adds an expert.
        kept_samples: How many training samples of older tasks later tasks see again; 0 for none.
        trains_a: False if a task chooses its A and trains B alone.
        budget: How a comparison chooses the method's rank: a kind in `cram.compare.entries.BUDGETS`.
    """

    name: ClassVar[str]
    told_task: ClassVar[bool] = False
    uses_queries: bool = False
    pool: ClassVar[tuple[str, ...] | None] = None
    kept_samples: ClassVar[int] = 0
    budget: ClassVar[str] = "task"
    trains_a: ClassVar[bool] = True

    def __init__(self, cram: AttachedModel) -> None:
        """Bind the method to an attached model without experts. A subclass may install gatings here."""
        self.cram = cram
        self.config = cram.config

    @property
    def wants_visual_means(self) -> bool:
        """True if the loss needs `ForwardState.hidden`: each linear's mean input over the image tokens."""
        return False

    @property
    def acts_elsewhere(self) -> bool:
        """True if the method changes more of the model than its experts hold."""
        return False

    def check_steps(self, task: str, total_steps: int) -> None:
        """Refuse a task that is too short for the method.

        Raises:
            ValueError: If it is.
        """

    def begin_task(self, task: str, total_steps: int) -> None:
        """Prepare the experts for a new task."""
        raise NotImplementedError

    def before_step(self, step: int) -> list[nn.Parameter] | None:
        """Return the parameters for a fresh optimiser, or None to keep the present optimiser."""
        return self.cram.trainable_parameters() if step == 0 else None

    def experts_replaced(self) -> None:
        """Forget what belonged to the old experts. `AttachedModel.set_experts` calls this."""

    def extra_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the method trains beside factors and gatings."""
        return []

    def observe(self, query: Query) -> None:
        """See the query of all samples of a training step, behind the step's forwards."""

    def extra_loss(self, state: ForwardState) -> Tensor | None:
        """Return a term for the cross-entropy of the training forward with this state, or None."""
        return None

    def end_task(self) -> None:
        """Freeze everything that the task has trained."""
        self.cram.freeze()

    def route(self, query: Query | None, training: bool) -> Route:
        """Return the route of a prefill or training forward. Its gates are [L, S, E]; S = 1 serves all rows.

        Args:
            query: Features of S samples. None is allowed only if the method does not use queries.
            training: True if the model is in training mode.
        """
        return uniform_route(self.cram)

    def gates(self, task: str) -> Tensor:
        """Return the gates [E] for every sample of a task. Only methods that are told the task have this."""
        raise NotImplementedError

    def export_state(self) -> MethodState:
        """Return the state for a bundle. By default: the gatings' tensors, named "<module path>.<key>".

        Nothing that the method does later changes the returned tensors.
        """
        tensors = {
            f"{path}.{key}": tensor.clone()
            for path, gating in self._gated().items()
            for key, tensor in gating.state_dict().items()
        }
        return MethodState(tensors, {})

    def import_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take up an exported state and rebuild derived data. The experts are in the model already, if any.

        Raises:
            ValueError: If names or shapes differ from those of `export_state`. Then nothing is changed.
        """
        check_state(tensors, {name: tuple(own.shape) for name, own in self.export_state().tensors.items()})
        for path, gating in self._gated().items():
            gating.load_state_dict({key: tensors[f"{path}.{key}"] for key in gating.state_dict()})

    def training_means(self) -> dict[str, CentroidMean]:
        """Return the running means that `observe` or a forward moves while a task is trained."""
        return {}

    def export_training(self) -> MethodState:
        """Return what the task in training holds, for a checkpoint within it. All processes must call it."""
        return MethodState(task_tensors(self.cram, self.training_means()), {})

    def import_training(
        self, task: str, total_steps: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
    ) -> None:
        """Begin a task again and take up an exported training. The model has the experts of earlier tasks.

        Raises:
            ValueError: If a tensor is missing or has another shape.
        """
        self.begin_task(task, total_steps)
        self.before_step(0)
        load_task_tensors(self.cram, self.training_means(), tensors)

    def facts(self) -> dict[str, float]:
        """Return numbers about the expert in training, for logs."""
        return {}

    def expert_groups(self) -> dict[str, int]:
        """Return expert -> instruction group, for methods in which queries choose between the tasks' experts.

        Reports then show groups, ranks and how samples were routed. Empty for all other methods.
        """
        return {}

    def values_per_expert(self) -> int:
        """Return the number of trained values that every expert has beside its factors."""
        return 0

    @classmethod
    def about(cls) -> str:
        """Return one or two sentences for a report: the first paragraph of the method's module docstring."""
        return " ".join((sys.modules[cls.__module__].__doc__ or "").split("\n\n")[0].split())

    def trained_values(self) -> int:
        """Return the number of trained values in use beside the experts' factors, by default the gatings'."""
        return sum(p.numel() for gating in self._gated().values() for p in gating.parameters())

    def release(self) -> None:
        """Remove from the model what the method has added outside the adapted linears."""

    def _gated(self) -> dict[str, nn.Module]:
        """Return the gatings by module path."""
        modules = self.cram.modules.items()
        return {path: module.gating for path, module in modules if module.gating is not None}


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
