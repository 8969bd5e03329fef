"""routed_expert_lora on Triton kernels: gates, SHRINK and EXPAND in two launches beside the base linear.

    forward     Y = X W0^T + b (BLAS)    Z = drop(X) A^T and g = softmax of distances    Y += (Z o w) Bt
                (in decoding; else U = Z o w in a launch of its own, then Y += U Bt)
    backward    that of expert_lora, whose dg goes on through the softmax to query and centroids

The gates are computed inside SHRINK's launch (see `kernels.routed_shrink`), so a layer with a router of its
own costs the launches of one with given gates. The two-operation form spends one launch more on a layer, or
one on a whole model whose layers share a query: `cram` computes the gates of all layers ahead, which its
penalty reads too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cram_kernels.centroid_gates.triton import centroid_gates_backward
from cram_kernels.expert_lora import tiles
from cram_kernels.expert_lora.decode import PLANES_TOKENS, linear, new_planes, operands
from cram_kernels.expert_lora.dropout import keep_scale
from cram_kernels.expert_lora.kernels.expand import expand
from cram_kernels.expert_lora.kernels.fold import fold
from cram_kernels.expert_lora.kernels.gating import gating, pitch_of
from cram_kernels.expert_lora.kernels.routed_shrink import Router, routed_shrink
from cram_kernels.expert_lora.routed_decode import new_gates, routed_decode
from cram_kernels.expert_lora.triton import (
    LayerBackward,
    kept_bits,
    kept_z,
    layer_backward,
    layer_gradients,
    mask_bits,
)
from cram_kernels.launch import architecture, on_device_of
from cram_kernels.once import once_differentiable
from cram_kernels.packing import PackedExperts


def routed_expert_lora(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    experts: PackedExperts,
    query: Tensor,
    centroids: Tensor,
    sigma: float,
    members: Tensor | None,
    segments: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    """Compute the layer in Triton; arguments as in `cram_kernels.routed_expert_lora`, already checked."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    a, bt, *trained = experts.factors()
    leaves = (rows, query, centroids, *trained)
    keep = torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in leaves)
    query, centroids = query.float().contiguous(), centroids.float().contiguous()
    allowed = None if members is None else members.contiguous().view(torch.uint8)
    owner: Any = experts._buffers["expert_of_row"]
    compiling, sigma = torch.compiler.is_compiling(), float(sigma)
    if not (keep or dropout or compiling) and 0 < rows.shape[0] <= PLANES_TOKENS and len(a):
        router, scale, arch = Router(query, centroids, allowed), experts.scale, architecture(x.device)
        with on_device_of(x):
            y, _ = routed_decode(rows, router, segments, weight, bias, a, bt, owner, sigma, scale, arch)
        return y if rows is x else y.view(*x.shape[:-1], y.shape[1])
    scale = experts.scale * (keep_scale(dropout) if dropout else 1.0)
    arguments: Any = (
        *(rows, query, centroids, *trained, weight, bias, a, bt, owner),
        *(allowed, segments, sigma, scale, dropout, seed, keep),
    )
    if compiling:
        y = torch.ops.cram.routed_expert_lora(*arguments)[0]
    else:
        y = (_RoutedExpertLora.apply if keep else _forward)(*arguments)[0]
    return y.view(*x.shape[:-1], y.shape[1])


def _forward(
    x: Tensor,
    query: Tensor,
    centroids: Tensor,
    trained_a: Tensor | None,
    trained_b: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    bt: Tensor,
    owner: Tensor,
    members: Tensor | None,
    segments: Tensor | None,
    sigma: float,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return Y [T, D_out], then Z [1, T, pitch] and dropout bits (empty if not kept) and gates [S, E]."""
    with on_device_of(x):
        router, tokens = Router(query, centroids, members), x.shape[0]
        if not tokens or not a.shape[0]:
            kept = kept_z(x, [a], keep), kept_bits(x, dropout, keep)
            return linear(x, weight, bias), *kept, new_gates(router).zero_()
        arch, bits = architecture(x.device), mask_bits(x, dropout, seed)
        if not keep and tokens <= PLANES_TOKENS:
            base, packed = (weight, bias), (a, bt, owner)
            y, gates = routed_decode(x, router, segments, *base, *packed, sigma, scale, arch, bits=bits)
            return y, x.new_empty(0), kept_bits(x, dropout, keep), gates
        y, gates, pitch = linear(x, weight, bias), new_gates(router), pitch_of([a.shape[0]])
        tile = tiles.shrink_tile(arch, x.dtype, tokens, pitch, x.shape[1])
        planes, u = new_planes(x, tile.split_k, 1, pitch), new_planes(x, 1, 1, pitch)
        (down,), ups = operands([a], x), operands([bt], x)
        gate = gating(gates, (owner,), segments, scale)
        routed_shrink(x, down, planes, gates, router, sigma, tile, bits=bits).run()
        whole = tile.split_k == 1
        z = x.new_empty(0) if not keep else planes[0] if whole else torch.empty_like(u[0])
        fold(planes, z if keep and not whole else None, u[0], gate, [a.shape[0]]).run()
        expand(u, ups, [y], gate, tiles.expand_tile(arch, x.dtype, tokens)).run()
        return y, z, kept_bits(x, dropout, keep) if bits is None or not keep else bits, gates


class _RoutedExpertLora(torch.autograd.Function):
    """Differentiable `_forward`; the registered operation shares its context and its backward."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, query, centroids, trained_a, trained_b, weight, _, a, bt, owner, _, segments = inputs[:12]
        leaves = (x, query, centroids, trained_a, trained_b)
        ctx.needs = [bool(leaf is not None and leaf.requires_grad) for leaf in leaves]
        ctx.trained = 0 if trained_a is None else trained_a.shape[0]
        ctx.sigma, ctx.scale = inputs[12:14]
        _, z, bits, gates = output
        ctx.save_for_backward(
            x if ctx.needs[3] else None, z, bits, gates, segments, query, centroids, weight, a, bt, owner
        )
        ctx.mark_non_differentiable(z, bits, gates)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*_gradients(ctx, dy, layer_backward), *[None] * 12)


def _gradients(ctx: Any, dy: Tensor, backward: LayerBackward) -> list[Tensor | None]:
    """Return the gradients of x, query, centroids and the trained factors."""
    x, z, bits, gates, segments, query, centroids, weight, a, bt, owner = ctx.saved_tensors
    need_x, need_query, need_centroids, need_a, need_b = ctx.needs
    needs = (need_x, need_query or need_centroids, need_a, need_b)
    dx, dgates, da, db = layer_gradients(
        backward,
        [dy],
        x,
        z,
        bits,
        gates,
        [weight],
        [a],
        [bt],
        [owner],
        segments,
        [ctx.trained],
        ctx.scale,
        *needs,
    )
    dquery = dcentroids = None
    if need_query or need_centroids:
        dquery, dcentroids = centroid_gates_backward(
            dgates.unsqueeze(0),
            gates.unsqueeze(0),
            query,
            centroids.unsqueeze(0),
            ctx.sigma,
            None,
            centroids.shape[0],
            (need_query, need_centroids),
        )
        dcentroids = None if dcentroids is None else dcentroids[0]
    found = (dx, dquery, dcentroids, da, db)
    return [grad if need else None for grad, need in zip(found, ctx.needs, strict=True)]


_LIBRARY = torch.library.Library("cram", "FRAGMENT")
_LIBRARY.define(
    "routed_expert_lora(Tensor x, Tensor query, Tensor centroids, Tensor? trained_a, Tensor? trained_b, "
    "Tensor weight, Tensor? bias, Tensor a, Tensor bt, Tensor owner, Tensor? members, Tensor? segments, "
    "float sigma, float scale, float dropout, Tensor? seed, bool keep) -> (Tensor, Tensor, Tensor, Tensor)"
)
for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("routed_expert_lora", _forward, _device)


def _forward_fake(x: Tensor, query: Tensor, centroids: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    weight, a, dropout, keep = arguments[2], arguments[4], arguments[-3], arguments[-1]
    kept = kept_z(x, [a], keep), kept_bits(x, dropout, keep)
    gates = query.new_empty(query.shape[0], centroids.shape[0])
    return x.new_empty(x.shape[0], weight.shape[0]), *kept, gates


def _op_backward(ctx: Any, dy: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*_gradients(ctx, dy, torch.ops.cram.expert_lora_backward), *[None] * 12)


torch.library.register_fake("cram::routed_expert_lora", _forward_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "cram::routed_expert_lora", _op_backward, setup_context=_RoutedExpertLora.setup_context, lib=_LIBRARY
)
