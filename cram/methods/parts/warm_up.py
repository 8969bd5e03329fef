"""CRAM's warm-up: a buffer LoRA acts and trains alone. Meanwhile the task's group and centroid are found."""

from __future__ import annotations

import torch
from torch import Tensor

from cram.model.attached import AttachedModel
from cram.model.factors import Factors, new_lora
from cram.routing.means import CentroidMean
from cram.routing.query import Query


class WarmUp:
    """The warm-up; each task begins it anew.

    Attributes:
        task: Name of the task.
        group: Instruction group of the newest batch. None before the first batch.
        mean: The mean of the images' features.
    """

    def __init__(self, cram: AttachedModel) -> None:
        """Binds the warm-up to a model. Nothing is in training yet."""
        self._cram = cram
        self.task = ""
        self.group: int | None = None
        self.mean = CentroidMean()

    def begin(self, task: str = "") -> None:
        """Start the buffer: in every module a LoRA of rank `config.buffer_rank` acts alone.

        Raises:
            ValueError: If a buffer exists or an expert is in training.
        """
        if self._cram.hooks.solo_in_training or self._cram.in_training:
            raise ValueError(
                "the warm-up must begin after the last one has ended and its expert is frozen, "
                "got a buffer or an expert in training"
            )
        self.task, self.group, self.mean = task, None, CentroidMean()
        self._cram.set_solo(new_lora(self._cram.modules, self._cram.config.buffer_rank), trained=True)

    def observe(self, group: int, query: Query) -> None:
        """Count a training batch and its group."""
        self.group = group
        self.mean.update(query.image, query.has_image)

    @property
    def has_images(self) -> bool:
        """True if an image was counted."""
        return self.mean.count > 0

    def centroid(self) -> Tensor:
        """Return the mean [D_q] of the images' features. Without an image it is zero."""
        return self.mean.mean() if self.has_images else torch.zeros(self._cram.encoder.image_dim)

    def factors(self) -> dict[str, Factors]:
        """Return the buffer's factors (a [r, D_in], b [D_out, r]) per module, detached.

        Raises:
            ValueError: If there is no buffer.
        """
        if not self._cram.hooks.solo_in_training:
            raise ValueError("the buffer's factors must be asked for during the warm-up, got no buffer")
        return {path: module.solo_factors() for path, module in self._cram.modules.items()}

    def end(self) -> None:
        """Drop the buffer. Without a buffer this does nothing."""
        self._cram.set_solo({})


def warmup_steps(max_steps: int, fraction: float) -> int:
    """Return the number of steps that train the buffer: max(1, round(fraction * max_steps)), ties to even.

    A fraction of 0 or less means no warm-up. The result is then -1, a step number that is never reached.

    Raises:
        ValueError: If ``max_steps`` is below 1.
    """
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")
    return max(1, round(max_steps * fraction)) if fraction > 0 else -1
