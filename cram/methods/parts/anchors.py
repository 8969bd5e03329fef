"""Anchors: one mean feature per task, which a sample's own feature is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cram.routing.means import CentroidMean


class Anchors:
    """The mean features of all tasks, float32.

    Attributes:
        rows: [T, D], one row per task; the last one moves while its task is trained.
        mean: The running mean that the last row follows.
    """

    def __init__(self, dim: int) -> None:
        """Starts without anchors."""
        self.rows = torch.zeros(0, dim)
        self.mean = CentroidMean()

    def begin(self) -> None:
        """Start a task's anchor. It is zero until the first feature."""
        self.rows, self.mean = F.pad(self.rows, (0, 0, 0, 1)), CentroidMean()

    def update(self, features: Tensor, present: Tensor | None = None) -> None:
        """Move the newest anchor to the mean of all features [S, D] so far, where `present` [S] is true."""
        self.mean.update(features, present)
        self.follow()

    def follow(self) -> None:
        """Move the newest anchor to its running mean, if that has begun."""
        if self.mean.count:
            self.rows[-1] = self.mean.mean()


def cosines(features: Tensor, anchors: Tensor) -> Tensor:
    """Return the cosines [S, T] of features [S, D] with anchors [T, D]; 0 where either is zero."""
    return F.cosine_similarity(features[:, None], anchors.to(features), dim=-1)
