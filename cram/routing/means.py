"""Means over samples and processes, in float32: no cast of the model and no autocast reaches them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Float32Module(nn.Module):
    """A module whose floating-point state stays float32 through ``.half()`` and ``.to(bfloat16)``.

    Routing compares distances of features with norms near 60; bfloat16 centroids would change the gates.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Module:
        super()._apply(partial(moved, fn), recurse)
        return self


def moved(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """What `fn` makes of a tensor, in the tensor's own dtype: a move stays a move, a cast is undone."""
    return tensor.to(fn(tensor).device)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Switches autocast off: what routes, and what is gathered over a task, keeps its own precision."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def reduced_sum(features: Tensor) -> tuple[Tensor, int]:
    """Sum [D] (float64) and row count of features [N, D], over all ranks of the default process group.

    Raises:
        ValueError: on every rank alike, if any rank holds NaN or Inf.
    """
    total = features.detach().sum(0, dtype=torch.float64)
    packed = torch.cat([total, total.new_tensor([features.shape[0]])])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(packed)
    if not bool(packed.isfinite().all()):
        raise ValueError("features must be finite, got NaN or Inf")
    return packed[:-1], int(packed[-1])


class CentroidMean:
    """Running mean of image features over the warm-up, weighted by image (method, level 2)."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self.count = 0

    def update(self, image: Tensor, has_image: Tensor | None = None) -> None:
        """Adds a batch; a collective call under ``torch.distributed``.

        Args:
            image: [N, D_q] or [N, ..., D_q] (middle dimensions are averaged first) features.
            has_image: [N] bool, rows to count; None counts all.

        Raises:
            ValueError: on a wrong shape or NaN/Inf in a counted row; the state is then unchanged.
        """
        if image.dim() < 2 or (self._sum is not None and image.shape[-1] != self._sum.shape[0]):
            width = "D_q" if self._sum is None else self._sum.shape[0]
            raise ValueError(f"image must be [N, ..., {width}], got {list(image.shape)}")
        rows = image.reshape(image.shape[0], -1, image.shape[-1]).float().mean(1)
        total, count = reduced_sum(rows if has_image is None else rows[has_image])
        self._sum = total if self._sum is None else self._sum + total
        self.count += count

    def mean(self) -> Tensor:
        """The centroid [D_q], float32.

        Raises:
            ValueError: if no image was counted.
        """
        if self._sum is None or not self.count:
            raise ValueError("mean must follow at least one image, got none")
        return (self._sum / self.count).float()

    def export(self) -> Tensor | None:
        """Returns the sum [D_q] and, behind it, the count, float64; None if no image was counted."""
        if self._sum is None or not self.count:
            return None
        return torch.cat([self._sum, self._sum.new_tensor([self.count])])

    def restore(self, state: Tensor) -> None:
        """Takes up an exported state [D_q + 1]."""
        self._sum, self.count = state[:-1].to(torch.float64, copy=True), int(state[-1])
