"""orthogonality_penalty, batched: modules of equal widths share one batched product.

    P = H A^T [M, B, r]     C = Bt Q [M, r, k]     energy = scale^2 * sum_k (P C)^2

Ranks and basis widths are padded with zeros inside, which add nothing to the sum. The vector z [B, D_out] is
never formed: Q is read once, by a product with the expert's few rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

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
    """Compute the penalty batch by batch; arguments as in `cram_kernels.orthogonality_penalty`, checked."""
    if mask is not None:
        hidden = [visual_mean(tokens, mask) for tokens in hidden]
    batches: dict[tuple[int, int, int], list[int]] = {}
    for m, (h, bt) in enumerate(zip(hidden, trained_b, strict=True)):
        batches.setdefault((h.shape[0], h.shape[1], bt.shape[1]), []).append(m)
    sums = []
    for members in batches.values():
        h = torch.stack([hidden[m] for m in members]).to(dtype)
        a = pad_sequence([trained_a[m] for m in members], batch_first=True).to(dtype)
        bt = pad_sequence([trained_b[m] for m in members], batch_first=True).to(dtype)
        basis = pad_sequence([bases[m].t() for m in members], batch_first=True).to(dtype)
        weight = torch.stack([gamma[m] for m in members]).to(dtype)
        projected = (h @ a.mT) @ (bt @ basis.mT)
        sums.append((weight * projected.square().sum(-1)).mean(1).sum())
    return torch.stack(sums).sum() * (scale**2 / len(hidden))
