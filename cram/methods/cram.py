"""CRAM (arXiv 2606.02502): one expert of adaptive rank a task, instruction groups, centroid routing.

The first steps of a task train a rank-48 buffer alone while its group is decided and the centroid averaged.
Then the buffer becomes the expert, which trains beside the group's frozen experts under the penalty.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cram.methods.base import Method
from cram.methods.parts.instantiate import instantiate_expert
from cram.routing.means import CentroidMean
from cram.routing.query import Query, Route

if TYPE_CHECKING:
    from cram.attach import Cram


class CramMethod(Method):
    """Stages of a task: warm-up of the buffer, instantiation, training of the expert."""

    name = "cram"
    uses_queries = True
    routed = True

    def __init__(self, cram: Cram) -> None:
        super().__init__(cram)
        self._task = ""
        self._switch = 0
        self._group: int | None = None
        self._centroid = CentroidMean()

    def begin_task(self, task: str, total_steps: int) -> None:
        """Start the buffer's warm-up.

        Raises:
            ValueError: If the task has no step left for the expert after the warm-up.
        """
        self._switch = warmup_steps(total_steps, self.config.warmup_fraction)
        if self._switch >= total_steps:
            raise ValueError(f"task {task!r} must have at least {self._switch + 1} steps, got {total_steps}")
        self._task, self._group, self._centroid = task, None, CentroidMean()
        self.cram.begin_buffer()

    def before_step(self, step: int) -> list[nn.Parameter] | None:
        """A fresh optimiser for the buffer at the first step and for the expert after the warm-up."""
        if step == self._switch:
            self._instantiate()
        return self.cram.trainable_parameters() if step in (0, self._switch) else None

    def observe(self, query: Query) -> None:
        """Update the group's prototype with the batch, and until the expert exists the centroid."""
        group = self.cram.router.groups.observe(self._task, query.text)
        if not self.cram.in_training:
            self._group = group
            self._centroid.update(query.image, query.has_image)

    def extra_loss(self) -> Tensor | None:
        """The orthogonality penalty while the expert is trained."""
        return self.cram.penalty() if self.cram.in_training else None

    def end_task(self) -> None:
        """Freeze the expert and its centroid."""
        self.cram.freeze()
        self.cram.locked_group = None

    def route(self, query: Query | None, training: bool) -> Route:
        """Centroid gates inside each sample's group; in training mode inside the locked group, if any.

        Raises:
            ValueError: Without a query, or as `Router.route`.
        """
        if query is None:
            raise ValueError("cram must see a query to route, got none")
        return self.cram.router.route(query, self.cram.locked_group if training else None)

    def _instantiate(self) -> None:
        cram, group = self.cram, self._group
        if group is None:
            raise ValueError(f"task {self._task!r} must have been routed during its warm-up, got no query")
        cram.router.groups.lock(self._task, group)
        weights = instantiate_expert(cram.buffers(), cram.history(group), self.config)
        if not self._centroid.count and cram.router.experts_of(group):
            # Without an image the group's first expert answers alone, and that one is frozen.
            raise ValueError(
                f"task {self._task!r} must show images in its warm-up to join experts of its group, got text"
            )
        centroid = self._centroid.mean() if self._centroid.count else torch.zeros(cram.encoder.image_dim)
        cram.end_buffer()
        cram.add_expert(self._task, weights, group, centroid)
        cram.prepare_penalty()
        cram.locked_group = group


def warmup_steps(max_steps: int, fraction: float) -> int:
    """Optimiser steps that train the buffer: max(1, round(fraction * max_steps)), ties to even.

    A fraction of 0 or less means no warm-up and gives -1, a step number that is never reached.

    Raises:
        ValueError: if ``max_steps`` is below 1.
    """
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")
    return max(1, round(max_steps * fraction)) if fraction > 0 else -1
