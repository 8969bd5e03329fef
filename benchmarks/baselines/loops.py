"""Loops over experts: the loop of the authors' released code, and the leanest form of that loop."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.problem import SCALE, Layer, Problem, leaf


class Released(nn.Module):
    """The released arithmetic: slots padded to the largest rank, two host reads per expert, gate last.

    As in the released code, the slots of A are one parameter and the slots of B another. Gates are per
    sample; the released code has one set of gates per batch.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.dropout = weight, bias, nn.Dropout(dropout)
        ranks = [len(one) for one in a]
        slots_a = weight.new_zeros(len(a), max(ranks), weight.shape[1])
        slots_b = weight.new_zeros(len(a), weight.shape[0], max(ranks))
        for e, rank in enumerate(ranks):
            slots_a[e, :rank], slots_b[e, :, :rank] = a[e], b[e]
        self.slots_a, self.slots_b = nn.Parameter(slots_a), nn.Parameter(slots_b)
        self.register_buffer("rank_of", torch.tensor(ranks, device=weight.device))
        self.register_buffer("committed", self.rank_of > 0)

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        """y for x [..., D_in] and gates [..., E] that broadcast over x's leading dimensions, in x.dtype."""
        y = F.linear(x, self.weight, self.bias)
        dropped = self.dropout(x)
        for e in range(len(self.slots_a)):
            if not bool(self.committed[e].item()):
                continue
            rank = int(self.rank_of[e].item())
            hidden = F.linear(dropped, self.slots_a[e, :rank])
            y = y + gates[..., e : e + 1] * (F.linear(hidden, self.slots_b[e, :, :rank]) * SCALE)
        return y


def released(p: Problem) -> Layer:
    """The released loop on a problem."""
    x, (route, leaves) = leaf(p.x), p.route()
    layer = Released(p.weight, p.bias, p.a, p.b)
    slots = {"slots_a": layer.slots_a, "slots_b": layer.slots_b}
    return Layer(lambda: layer(x, p.over_tokens(route()).to(x.dtype)), {"x": x, **leaves, **slots})


def loop(p: Problem) -> Layer:
    """One pair of small products per expert, the gate on the rank axis, no padding, no host read."""
    x, (route, leaves) = leaf(p.x), p.route()
    last_a, last_bt = leaf(p.a[-1]), leaf(p.b[-1].t().contiguous())
    a, b = [*p.a[:-1], last_a], [*p.b[:-1], last_bt.t()]

    def forward() -> Tensor:
        y = F.linear(x, p.weight, p.bias)
        gates = p.over_tokens(route()).to(x.dtype) * SCALE
        for e, (a_e, b_e) in enumerate(zip(a, b, strict=True)):
            y = y + F.linear(F.linear(x, a_e) * gates[:, e : e + 1], b_e)
        return y

    return Layer(forward, {"x": x, **leaves, "a": last_a, "b": last_bt})
