"""Directions of a linear's input space: outside of a space, the strongest ones, those that a space lacks."""

from __future__ import annotations

import torch
from torch import Tensor

POWER_ITERATIONS = 2


def outside(gradient: Tensor, space: Tensor) -> Tensor:
    """Return (I - P^T P) G^T [D_in, D_out] of G [D_out, D_in] and the orthonormal rows P [k, D_in]."""
    transposed = gradient.mT
    return transposed - space.mT @ (space @ transposed)


def top_directions(matrix: Tensor, rank: int) -> Tensor:
    """Return the top left singular vectors [rank, D] of a matrix [D, N]; zero rows where it has fewer.

    By a randomised range finder (Halko, Martinsson and Tropp 2011), the same in every process.
    """
    generator = torch.Generator().manual_seed(0)
    count = min(2 * rank, *matrix.shape)
    basis = matrix @ torch.randn(matrix.shape[1], count, generator=generator).to(matrix)
    for _ in range(POWER_ITERATIONS):
        basis = matrix @ (matrix.mT @ torch.linalg.qr(basis)[0])
    basis = torch.linalg.qr(basis)[0]
    left = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)[0]
    rows = matrix.new_zeros(rank, matrix.shape[0])
    found = (basis @ left).mT[:rank]
    rows[: len(found)] = found
    return rows


def missing_directions(weight: Tensor, space: Tensor, energy: float, below: bool = False) -> Tensor:
    """Return the directions [k, D_in] that a space lacks to hold a share of a matrix's energy.

    Args:
        weight: [D_out, D_in].
        space: Orthonormal rows [m, D_in].
        energy: The share of the squared Frobenius norm.
        below: True stops before the share is reached, but not before the first direction.
    """
    rest = outside(weight, space)
    left, values, _ = torch.linalg.svd(rest, full_matrices=False)
    total = weight.double().square().sum().clamp(min=torch.finfo(torch.float64).tiny)
    shares = values.double().square() / total
    held = 1 - rest.double().square().sum() / total + shares.cumsum(0)
    count = max(1, int((held < energy).sum())) if below else int((held - shares < energy).sum())
    return left[:, : min(count, weight.shape[1] - len(space))].mT
