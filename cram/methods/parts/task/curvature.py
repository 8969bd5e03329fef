"""The directions of a linear's inputs, gathered while a task is trained, and the steps that follow from them.

U holds orthonormal directions and S the deviation of the inputs along each, by a randomised range finder:

    U = qr(C Q)        C: covariance of a step's inputs, Q: random [D_in, K]
    S_j = std(u_j . x)                                          over the inputs of the step after that
"""

from __future__ import annotations

import torch
from torch import Tensor

ENERGY = 0.9  # share of the sum of S^2 that the leading directions hold
NARROWEST = 1e-10


def leading(scales: Tensor) -> int:
    """How many of the scales S [K] are needed to pass `ENERGY` of the sum of S^2; 0 if all are zero."""
    energy = scales.double().square()
    if not float(energy.sum()) > NARROWEST:
        return 0
    within = int((energy.cumsum(0) / energy.sum() <= ENERGY).sum())
    return min(within + 1, len(scales))


def damped(gradient: Tensor, basis: Tensor, scales: Tensor, window: int, most: float) -> Tensor:
    """Shorten a gradient [N, D_in] along wide directions, by at most a share `most`; the rest is untouched.

    Args:
        gradient: [N, D_in].
        basis: U [D_in, K].
        scales: S [K], of which a mean over the last `window` counts.
        window: Number of scales in a mean.
        most: The share.
    """
    count = leading(scales)
    if not count:
        return gradient
    smooth = torch.stack([scales[max(0, i - window + 1) : i + 1].mean() for i in range(count)])
    factors = 1 / (smooth + 1e-6)
    factors = (factors / factors.max()).clamp(1 - most, 1 + most).to(gradient)
    along = basis[:, :count].to(gradient)
    inside = gradient @ along
    return gradient + (inside * (factors - 1)) @ along.mT


def preconditioned(gradient: Tensor, basis: Tensor, scales: Tensor, mu: float) -> Tensor:
    """Multiply a gradient [N, D_in] by U diag(1 / (S + mu)) U^T + (I - U U^T) / mu, with the leading U, S."""
    count = leading(scales)
    if not count:
        return gradient
    along = basis[:, :count].to(gradient)
    inside = gradient @ along
    factors = (1 / (scales[:count] + mu)).to(gradient)
    return gradient / mu + (inside * (factors - 1 / mu)) @ along.mT


def random_directions(width: int, count: int, seed: int) -> Tensor:
    """Q [width, count], the same in every process."""
    return torch.randn(width, count, generator=torch.Generator().manual_seed(seed))


def range_basis(product: Tensor, total: Tensor, tokens: Tensor, directions: Tensor) -> Tensor:
    """U [D_in, K] from sums over tokens: x (x . Q) [D_in, K] and x [D_in]."""
    centred = product - total[:, None] * (total @ directions)[None] / tokens.clamp(min=1)
    return torch.linalg.qr(centred)[0]


def deviations(squares: Tensor, total: Tensor, tokens: Tensor) -> Tensor:
    """S [K] from sums over tokens of (u . x)^2 and u . x, both [K]."""
    spread = squares - total.square() / tokens.clamp(min=1)
    return (spread.clamp(min=0) / (tokens - 1).clamp(min=1)).sqrt()
