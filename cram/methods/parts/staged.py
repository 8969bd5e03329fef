"""A task in two stages: a buffer warms up, then the expert that is made of it is trained.

The warm-up also decides the task's group and averages its centroid. The state of a task in training is one of
the two: the buffer with what was found so far, or the expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from cram.methods.base import MethodState
from cram.methods.parts.grouped import GroupedMethod
from cram.methods.parts.instantiate import instantiate_modules, mean_novelty
from cram.methods.parts.task.state import TRAINED, load_task_tensors
from cram.methods.parts.warm_up import WarmUp, warmup_steps
from cram.model.attached import AttachedModel
from cram.model.factors import Factors
from cram.routing.means import CentroidMean
from cram.routing.query import Query


class StagedMethod(GroupedMethod):
    """Stages of a task: warm-up of the buffer, instantiation, training of the expert.

    Attributes:
        warm_up: The buffer, and what the warm-up learns of the task.
    """

    def __init__(self, cram: AttachedModel) -> None:
        super().__init__(cram)
        self.warm_up = WarmUp(cram)
        self._switch = 0
        self._novelty = 1.0

    def check_steps(self, task: str, total_steps: int) -> None:
        """Refuse a task that has no step left for the expert after the warm-up."""
        warmed = warmup_steps(total_steps, self.config.warmup_fraction)
        if warmed >= total_steps:
            raise ValueError(f"task {task!r} must have at least {warmed + 1} steps, got {total_steps}")

    def begin_task(self, task: str, total_steps: int) -> None:
        """Start the buffer's warm-up."""
        self.check_steps(task, total_steps)
        self._switch = warmup_steps(total_steps, self.config.warmup_fraction)
        self.warm_up.begin(task)

    def before_step(self, step: int) -> list[nn.Parameter] | None:
        """Return the buffer's parameters at the first step and the expert's after the warm-up."""
        if step == self._switch:
            self._instantiate()
        return self.cram.trainable_parameters() if step in (0, self._switch) else None

    def observe(self, query: Query) -> None:
        """Update the group's prototype with the batch. During the warm-up, update the centroid as well."""
        group = self.router.groups.observe(self.warm_up.task, query.text)
        if not self.cram.in_training:
            self.warm_up.observe(group, query)

    def training_means(self) -> dict[str, CentroidMean]:
        """Return the mean of the warm-up's images."""
        return {"centroid": self.warm_up.mean}

    def export_training(self) -> MethodState:
        """Return the buffer or the expert in training, the groups, and what the warm-up has found."""
        tensors, values = super().export_training()
        groups, locks = self.router.groups.export_state()
        tensors |= {f"groups.{name}": tensor for name, tensor in groups.items()}
        state = {"group": self.warm_up.group, "expert": self.cram.in_training, "novelty": self._novelty}
        return MethodState(tensors, {**values, **locks, **state})

    def import_training(
        self, task: str, total_steps: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
    ) -> None:
        """Begin a task again in the stage of an exported training; see `Method.import_training`.

        Raises:
            ValueError: If a part is missing or does not fit the model.
        """
        self.begin_task(task, total_steps)
        groups = {name: tensors[f"groups.{name}"] for name in ("prototypes", "counts")}
        self.router.groups.import_state(groups, values)
        self.warm_up.group, self._novelty = values["group"], values["novelty"]
        if values["expert"]:
            trained = [tensors[f"{TRAINED}{index}"] for index in range(2 * len(self.cram.modules) + 1)]
            pairs = zip(trained[:-1:2], trained[1:-1:2], strict=True)
            weights = {path: (a, bt.mT) for path, (a, bt) in zip(self.cram.modules, pairs, strict=True)}
            self.start_expert(weights, trained[-1])
        load_task_tensors(self.cram, self.training_means(), tensors)

    def freeze(self) -> None:
        """End the training of expert and centroid.

        Raises:
            ValueError: If no expert is in training, as when a training ends within the warm-up.
        """
        if self.cram.hooks.solo_in_training:
            raise ValueError(
                f"task {self.warm_up.task!r} must be trained beyond its warm-up of {self._switch} steps, "
                "got an end within it"
            )
        super().freeze()

    def facts(self) -> dict[str, float]:
        """Return the mean rank of the expert in training, its mean novelty, and the number of groups."""
        if not self.cram.in_training:
            return {"groups": len(self.router.groups)}
        ranks = self.cram.expert_ranks(self.cram.num_experts - 1).values()
        mean_rank = sum(ranks) / len(ranks)
        return {"rank": mean_rank, "novelty": self._novelty, "groups": len(self.router.groups)}

    def _instantiate(self) -> None:
        warm_up, group = self.warm_up, self.warm_up.group
        if group is None:
            raise ValueError(f"task {warm_up.task!r} must have been routed during its warm-up, got no query")
        self.router.groups.lock(warm_up.task, group)
        made = instantiate_modules(warm_up.factors(), self.history(group), self.config)
        self._novelty = mean_novelty(made.values())
        if not warm_up.has_images and self.router.experts_of(group):
            # Without an image only the group's first expert answers, and that expert is frozen.
            raise ValueError(
                f"task {warm_up.task!r} must show images in its warm-up to join its group's experts, got text"
            )
        self.start_expert({path: (module.a, module.b) for path, module in made.items()}, warm_up.centroid())

    def start_expert(self, weights: Mapping[str, Factors], centroid: Tensor) -> None:
        """Put an expert into training in the buffer's place."""
        group = self.warm_up.group
        assert group is not None
        self.warm_up.end()
        self.add_expert(self.warm_up.task, weights, group, centroid)
        self.locked_group = group
