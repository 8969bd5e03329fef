"""Other layouts of the same products: grouped_mm over padded experts, and EXPAND inside the base product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.problem import SCALE, Layer, Problem


def grouped(p: Problem) -> Layer:
    """`torch._grouped_mm`, one row per (token, expert). Ranks are padded to the largest, and to 16 bytes."""
    ranks, tokens = p.case.ranks, p.case.tokens
    experts, rank = len(ranks), -(-max(ranks) // 8) * 8
    down = p.x.new_zeros(experts, p.weight.shape[1], rank)
    up = p.x.new_zeros(experts, rank, p.weight.shape[0])
    for e, width in enumerate(ranks):
        down[e, :, :width], up[e, :width] = p.a[e].t(), p.b[e].t()
    route, _ = p.route()
    ends = torch.arange(1, experts + 1, device=p.x.device, dtype=torch.int32) * tokens

    def forward() -> Tensor:
        z = torch._grouped_mm(p.x.repeat(experts, 1), down, offs=ends)
        w = p.over_tokens(route()).t().reshape(-1, 1) * SCALE
        delta = torch._grouped_mm((z * w).to(z.dtype), up, offs=ends)
        return F.linear(p.x, p.weight, p.bias) + delta.view(experts, tokens, -1).sum(0)

    return Layer(forward, {})


def concatenated(p: Problem) -> Layer:
    """[x | U] [W0 | B]^T as one product. x lies in a buffer with room for U, and W0 is stored beside B.

    EXPAND then costs no pass over y. The price is the layout: the layer before would have to write it.
    """
    rank, width = p.packed_a.shape[0], p.weight.shape[1]
    pitch = -(-rank // 16) * 16
    rows = F.pad(p.x, (0, pitch))
    weight = torch.cat([p.weight, F.pad(p.packed_bt.t(), (0, pitch - rank))], 1)
    route, _ = p.route()
    times = p.case.tokens // p.case.segments

    def forward() -> Tensor:
        z = F.linear(rows[:, :width], p.packed_a)
        w = route().index_select(1, p.owner) * SCALE
        gated = z.view(-1, times, rank) * w.unsqueeze(1)
        rows[:, width : width + rank] = gated.view(-1, rank)
        return F.linear(rows, weight, p.bias)

    return Layer(forward, {})
