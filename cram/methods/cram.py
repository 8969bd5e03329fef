"""CRAM (arXiv 2606.02502): one expert of adaptive rank per task, instruction groups, centroid routing.

The first steps of a task train a buffer: a LoRA of rank 48 that acts alone. These steps also decide the
task's group and average its centroid. Then the buffer becomes the expert. The expert trains beside the frozen
experts of its group, under the orthogonality penalty.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cram.methods.parts.penalty import HistoryBases, Penalty
from cram.methods.parts.staged import StagedMethod
from cram.model.attached import AttachedModel
from cram.model.factors import Factors
from cram.model.state import ForwardState


class CramMethod(StagedMethod):
    """The stages of a task, and the orthogonality penalty in the second one."""

    name = "cram"

    def __init__(self, cram: AttachedModel) -> None:
        super().__init__(cram)
        self._bases = HistoryBases()
        self._penalty: Penalty | None = None

    def start_expert(self, weights: Mapping[str, Factors], centroid: Tensor) -> None:
        """Put the expert into training, with the bases of its penalty."""
        super().start_expert(weights, centroid)
        self.prepare_penalty()

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
