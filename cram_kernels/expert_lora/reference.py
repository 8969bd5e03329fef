"""expert_lora, the formula: expert by expert, differentiable by autograd, any device, any dtype.

    y = W0 x + b + sum_e g[s(t), e] * scale * B_e A_e drop(x)

Matrix products run in x.dtype; gating and the sum over experts run in float32 (float64 for float64 input).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cram_kernels.expert_lora.dropout import dropout_mask, keep_scale
from cram_kernels.packing import PackedExperts


def expert_lora(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    experts: PackedExperts,
    gates: Tensor,
    segments: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    """Compute the formula; arguments as in `cram_kernels.expert_lora`, already checked."""
    rows = x.reshape(-1, x.shape[-1])
    y = F.linear(rows, weight, bias)
    out = y.to(torch.promote_types(x.dtype, gates.dtype))
    gate_rows = _rows_of(gates, rows.shape[0], segments)
    scale = experts.scale
    if seed is not None:
        rows = rows * dropout_mask(seed, rows.shape[0], rows.shape[1], dropout, rows.device, x.dtype)
        scale *= keep_scale(dropout)
    for e in range(experts.num_experts):
        a, b = experts.expert(e)
        delta = F.linear(F.linear(rows, a.to(x.dtype)), b.to(x.dtype)).to(out.dtype)
        gate = gate_rows[:, e : e + 1]
        # A gate of exactly 0 selects: NaN behind it must not pass, and its own gradient must stay exact.
        out = out + gate * scale * torch.where(gate == 0, delta.nan_to_num(), delta)
    return out.to(y.dtype).reshape(*x.shape[:-1], weight.shape[0])


def _rows_of(gates: Tensor, tokens: int, segments: Tensor | None) -> Tensor:
    """Spread gates [S, E] over tokens: [T, E]."""
    if segments is not None:
        return gates.index_select(0, segments)
    return gates if gates.shape[0] == tokens else gates.repeat_interleave(tokens // gates.shape[0], 0)
