"""Ranks packed into two products, in plain PyTorch, with and without torch.compile."""

from __future__ import annotations

from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.problem import SCALE, Layer, Problem, leaf


def _layer(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, bt: Tensor, gates: Tensor, owner: Tensor
) -> Tensor:
    """y = W0 x + b, then the gated product added in place."""
    z = F.linear(x, a)
    w = gates.index_select(1, owner) * SCALE
    u = (z.unflatten(0, (w.shape[0], -1)) * w.unsqueeze(1)).flatten(0, 1).to(x.dtype)
    return F.linear(x, weight, bias).addmm_(u, bt)


@cache
def _compiled() -> object:
    return torch.compile(_layer, dynamic=False, fullgraph=True)


def packed(p: Problem, compiled: bool = False) -> Layer:
    """Two large products for any number of experts. Autograd makes the backward pass."""
    x, (route, leaves) = leaf(p.x), p.route()
    tail = p.packed_a.shape[0] - p.trained_rank
    a, bt, owner = p.packed_a, p.packed_bt, p.owner
    trained = {"a": leaf(a[tail:].clone()), "b": leaf(bt[tail:].clone())} if p.case.training else {}
    layer = _compiled() if compiled else _layer

    def forward() -> Tensor:
        # Autograd wants the trained rows as tensors of their own.
        factors = (
            (torch.cat([a[:tail], trained["a"]]), torch.cat([bt[:tail], trained["b"]]))
            if trained
            else (a, bt)
        )
        return layer(x, p.weight, p.bias, *factors, route(), owner)

    return Layer(forward, {"x": x, **leaves, **trained})


compiled = partial(packed, compiled=True)
