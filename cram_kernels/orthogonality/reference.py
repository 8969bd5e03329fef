"""orthogonality_penalty, the formula: one module after another.

mean over modules of mean_b gamma[b] * | Q^T (scale * B A h_b) |^2
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cram_kernels.orthogonality.pooling import visual_mean


def orthogonality_penalty(
    hidden: Sequence[Tensor],
    trained_a: Sequence[Tensor],
    trained_b: Sequence[Tensor],
    bases: Sequence[Tensor],
    gamma: Sequence[Tensor] | Tensor,
    mask: Tensor | None,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """Compute the formula; arguments as in `cram_kernels.orthogonality_penalty`, checked, none empty."""
    if mask is not None:
        hidden = [visual_mean(tokens, mask) for tokens in hidden]
    total = hidden[0].new_zeros((), dtype=dtype)
    for h, a, bt, basis, weight in zip(hidden, trained_a, trained_b, bases, gamma, strict=True):
        z = scale * (h.to(dtype) @ a.to(dtype).t() @ bt.to(dtype))
        energy = (z @ basis.to(dtype)).square().sum(-1)
        total = total + (weight.to(dtype) * energy).mean()
    return total / len(hidden)
