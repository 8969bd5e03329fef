"""What gatings compute from a whole sample: its first token, its mean, the top-k softmax."""

from __future__ import annotations

import torch
from torch import Tensor


def first_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """The first real token of each row of x [B, T, D], by mask [B, T] (bool; None: all): float32 [B, D]."""
    if mask is None:
        return x[:, 0].float()
    return x[torch.arange(len(x), device=x.device), mask.to(x.device).int().argmax(1)].float()


def token_means(x: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over the real tokens of each row of x [B, T, D], by mask [B, T] as above: [B, D].

    float32, or float64 for float64 x.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if mask is None:
        return x.mean(1, dtype=dtype)
    real = mask.to(x.device)[:, :, None]
    return torch.where(real, x, 0).sum(1, dtype=dtype) / real.sum(1).clamp(min=1)


def top_gates(logits: Tensor, k: int) -> Tensor:
    """Softmax over the k largest of logits [S, E], exactly 0 elsewhere: [S, E].

    With k = 1 the gate is exactly 1 and its gradient exactly 0.
    """
    values, index = logits.topk(k, -1)
    return torch.zeros_like(logits).scatter(-1, index, values.softmax(-1))
