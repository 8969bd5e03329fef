"""Y and dX: the base products and EXPAND on one result, in the order that `tiles.ORDER` gives.

adds        Y = X W^T + b,  Y += U Bt        or, chunk by chunk of tokens, both before the next chunk
base_last   Y = U Bt + b,   Y += X W^T       the base product with beta = 1, in place
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cram_kernels.expert_lora import tiles
from cram_kernels.expert_lora.decode import linear, operands
from cram_kernels.expert_lora.kernels.expand import expand
from cram_kernels.expert_lora.kernels.gating import Gating


def forward_outputs(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bt: Sequence[Tensor],
    u: Tensor,
    gate: Gating,
    arch: int,
) -> list[Tensor]:
    """Return every Y_p, base products and U_p Bt_p, in the order that the table says."""
    tokens, ups = x.shape[0], operands(bt, x)
    tile, order = tiles.expand_tile(arch, x.dtype, tokens), tiles.order(arch, x.dtype, tokens)
    if not order.base_last and order.chunk is None:
        outputs = [linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        expand(u, ups, outputs, gate, tile).run()
        return outputs
    outputs = [x.new_empty(tokens, weight.shape[0]) for weight in weights]
    given = None
    if order.base_last and any(bias.numel() for bias in biases):
        given = [
            b.contiguous() if b.numel() else y.new_zeros(y.shape[1])
            for b, y in zip(biases, outputs, strict=True)
        ]
    for rows in order.chunks(tokens):
        parts = [y[rows] for y in outputs]
        added = expand(u[:, :, rows], ups, parts, gate, tile, biases=given, adds=not order.base_last)
        if order.base_last:
            added.run()
            for y, weight in zip(parts, weights, strict=True):
                y.addmm_(x[rows], weight.t())
            continue
        for y, weight, bias in zip(parts, weights, biases, strict=True):
            if bias.numel():
                torch.addmm(bias, x[rows], weight.t(), out=y)
            else:
                torch.mm(x[rows], weight.t(), out=y)
        added.run()
    return outputs


def base_gradient(dys: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Return the sum over p of dY_p W_p [T, D_in], added in the order of the projections."""
    dx = dys[0] @ weights[0]
    for dy, weight in zip(dys[1:], weights[1:], strict=True):
        dx.addmm_(dy, weight)
    return dx


def input_gradient(
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    dz: Tensor,
    a: Sequence[Tensor],
    bits: Tensor | None,
    gate: Gating,
    arch: int,
) -> Tensor:
    """Return dX: base products and drop(sum_p dZ_p A_p), in the order that the table says."""
    first = dys[0]
    tokens, downs = first.shape[0], operands(a, first)
    tile, order = tiles.expand_tile(arch, first.dtype, tokens), tiles.order(arch, first.dtype, tokens)
    if not order.base_last and order.chunk is None:
        dx = base_gradient(dys, weights)
        expand(dz.unsqueeze(0), downs, [dx], gate, tile, bits=bits).run()
        return dx
    dx = first.new_empty(tokens, weights[0].shape[1])
    for rows in order.chunks(tokens):
        part, mask = dx[rows], None if bits is None else bits[rows]
        added = expand(dz[None, :, rows], downs, [part], gate, tile, bits=mask, adds=not order.base_last)
        pairs = list(zip(dys, weights, strict=True))
        if order.base_last:
            added.run()
        else:
            dy, weight = pairs.pop(0)
            torch.mm(dy[rows], weight, out=part)
        for dy, weight in pairs:
            part.addmm_(dy[rows], weight)
        if not order.base_last:
            added.run()
    return dx
