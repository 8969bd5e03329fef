"""Mean of a sample's visual tokens: the penalty's input, where the implementation does not pool inside."""

from __future__ import annotations

import torch
from torch import Tensor


def visual_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x [B, T, D] over the positions of mask [B, T] (bool); zero for a sample that has none.

    Masked-out positions are selected away, not multiplied by zero, so NaN in padding does not leak. Half
    precision is accumulated and returned in float32.

    Raises:
        ValueError: The shapes do not match or the mask is not bool.
    """
    if x.dim() != 3 or mask.shape != x.shape[:2] or mask.dtype != torch.bool:
        raise ValueError(
            f"x and mask must be [B, T, D] and bool [B, T], "
            f"got {list(x.shape)} and {mask.dtype} {list(mask.shape)}"
        )
    total = x.masked_fill(~mask[:, :, None], 0.0).sum(1, dtype=torch.promote_types(x.dtype, torch.float32))
    return total / mask.sum(1, keepdim=True).clamp(min=1)
