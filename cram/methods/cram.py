"""CRAM (arXiv 2606.02502): one expert of adaptive rank per task, instruction groups, centroid routing.

The first steps of a task train a buffer: a LoRA of rank 48 that acts alone. These steps also decide the
task's group and average its centroid. Then the buffer becomes the expert. The expert trains beside the frozen
experts of its group, under the orthogonality penalty.
"""

from __future__ import annotations

from torch import Tensor, nn

from cram.methods.parts.grouped import GroupedMethod
from cram.methods.parts.instantiate import instantiate_expert
from cram.methods.parts.penalty import HistoryBases, Penalty
from cram.methods.parts.warm_up import WarmUp, warmup_steps
from cram.model.attached import AttachedModel
from cram.model.state import ForwardState
from cram.routing.query import Query


class CramMethod(GroupedMethod):
    """Stages of a task: warm-up of the buffer, instantiation, training of the expert.

    Attributes:
        warm_up: The buffer, and what the warm-up learns of the task.
    """

    name = "cram"

    def __init__(self, cram: AttachedModel) -> None:
        super().__init__(cram)
        self.warm_up = WarmUp(cram)
        self._bases = HistoryBases()
        self._penalty: Penalty | None = None
        self._switch = 0

    def begin_task(self, task: str, total_steps: int) -> None:
        """Start the buffer's warm-up.

        Raises:
            ValueError: If the task has no step left for the expert after the warm-up.
        """
        self._switch = warmup_steps(total_steps, self.config.warmup_fraction)
        if self._switch >= total_steps:
            raise ValueError(f"task {task!r} must have at least {self._switch + 1} steps, got {total_steps}")
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

    def extra_loss(self, state: ForwardState) -> Tensor | None:
        """Return the orthogonality penalty of the forward, or None during the warm-up."""
        return self.penalty(state) if self.cram.in_training else None

    def end_task(self) -> None:
        """Freeze the expert and its centroid."""
        self.freeze()
        self.locked_group = None

    def freeze(self) -> None:
        """Ends the training of expert and centroid, and drops the penalty.

        Raises:
            ValueError: If no expert is in training.
        """
        super().freeze()
        self._penalty = None

    def experts_replaced(self) -> None:
        """Forget centroids and penalty. The groups stay."""
        super().experts_replaced()
        self._penalty = None

    def prepare_penalty(self) -> None:
        """Computes the penalty's bases for the expert in training. Call once per task, after `add_expert`.

        Raises:
            ValueError: If no expert is in training.
        """
        self._penalty = Penalty(self.cram, self.router, self._bases)

    def penalty(self, state: ForwardState) -> Tensor:
        """Returns lambda times the orthogonality penalty of a training forward, a scalar.

        The value is 0 if the group has no older experts.

        Raises:
            ValueError: If `prepare_penalty` is missing, or the forward was no training forward.
        """
        if self._penalty is None:
            raise ValueError("penalty must follow prepare_penalty, got no bases")
        return self._penalty.value(state)

    @property
    def wants_visual_means(self) -> bool:
        """True while an expert is trained and its group has older experts."""
        return self._penalty is not None and self._penalty.needed

    def _instantiate(self) -> None:
        warm_up, group = self.warm_up, self.warm_up.group
        if group is None:
            raise ValueError(f"task {warm_up.task!r} must have been routed during its warm-up, got no query")
        self.router.groups.lock(warm_up.task, group)
        weights = instantiate_expert(warm_up.factors(), self.history(group), self.config)
        if not warm_up.has_images and self.router.experts_of(group):
            # Without an image only the group's first expert answers, and that expert is frozen.
            raise ValueError(
                f"task {warm_up.task!r} must show images in its warm-up to join its group's experts, got text"
            )
        warm_up.end()
        self.add_expert(warm_up.task, weights, group, warm_up.centroid())
        self.prepare_penalty()
        self.locked_group = group
