"""expert_lora as one product, where the caller owns memory behind each row of x and of W.

    Y = [x | U] [W | B]^T + b        U = (x A^T) o w, which SHRINK and FOLD write behind x

EXPAND and its two passes over Y fall away; the product is `room` columns deeper. The layer in front must
write x into the wide rows: a copy of x costs more than it saves. Inference with Triton only.

B is multiplied without looking at the gates, so NaN or Inf in an expert reaches every row, as in `F.linear`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cram_kernels.expert_lora import tiles
from cram_kernels.expert_lora.decode import SKIP_RANK, new_planes, operands
from cram_kernels.expert_lora.kernels.fold import fold
from cram_kernels.expert_lora.kernels.gating import gating, pitch_of
from cram_kernels.expert_lora.kernels.shrink import shrink
from cram_kernels.launch import architecture, on_device_of
from cram_kernels.packing import PackedExperts


def room(experts: PackedExperts) -> int:
    """Return how many columns must lie behind x and behind W: the packed rows, rounded up to 16."""
    return pitch_of([experts.total_rank])


def widened(weight: Tensor, experts: PackedExperts) -> Tensor:
    """Return [W | B | 0], [D_out, D_in + room], in W's dtype."""
    up = experts.factors()[1].t().to(weight.dtype)
    return torch.cat([weight, F.pad(up, (0, room(experts) - up.shape[1]))], 1)


@torch.no_grad()
def wide_expert_lora(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    experts: PackedExperts,
    gates: Tensor,
    segments: Tensor | None = None,
) -> Tensor:
    """Return Y [T, D_out]; overwrites what lies behind x.

    Args:
        rows: [T, D_in + room], contiguous: x, and `room(experts)` columns that U is written to.
        weight: `widened(W, experts)`.
        bias: [D_out] or None.
        experts: At least one packed row.
        gates: [S, E] float32.
        segments: [T], the row of gates of each token, or None for equal blocks of tokens.

    Raises:
        ValueError: The widths of rows or weight are not D_in + room, or no expert has a row.
    """
    width = experts.in_features + room(experts)
    if not experts.total_rank or rows.shape[1] != width or weight.shape[1] != width:
        raise ValueError(
            f"rows and weight must be {width} wide, D_in + room of at least one packed row, "
            f"got {rows.shape[1]} and {weight.shape[1]}"
        )
    x, behind = rows[:, : experts.in_features], rows[None, :, experts.in_features :]
    with on_device_of(rows):
        gate = gating(gates, (experts.expert_of_row,), segments, experts.scale)
        pitch, arch = room(experts), architecture(rows.device)
        tile = tiles.shrink_tile(arch, rows.dtype, len(rows), pitch, x.shape[1])
        planes = new_planes(rows, tile.split_k, 1, pitch)
        shrink(x, operands([experts.factors()[0]], x), planes, gate, tile, skip=pitch > SKIP_RANK).run()
        fold(planes, None, behind, gate, [experts.total_rank]).run()
        return F.linear(rows, weight, bias)
