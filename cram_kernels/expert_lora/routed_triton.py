"""routed_expert_lora on Triton kernels: gates, SHRINK and EXPAND in two launches beside the base linear.

    forward     Y = X W0^T + b (BLAS)    Z = drop(X) A^T and g = softmax of distances    Y += (Z o w) Bt
    backward    that of expert_lora, whose dg goes on through the softmax to query and centroids

The gates are computed inside SHRINK's launch (see `kernels.routed_shrink`), so a layer with a router of its
own costs the launches of one with given gates. The two-operation form spends one launch more on a layer, or
one on a whole model whose layers share a query: `cram` computes the gates of all layers ahead, which its
penalty reads too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cram_kernels.centroid_gates.triton import centroid_gates_backward
from cram_kernels.dispatch import interpreted
from cram_kernels.expert_lora import tiles
from cram_kernels.expert_lora.dropout import keep_scale
from cram_kernels.expert_lora.kernels.expand import expand
from cram_kernels.expert_lora.kernels.gating import dropout_words, gating, pitch_of
from cram_kernels.expert_lora.kernels.gram import reduce_planes
from cram_kernels.expert_lora.kernels.routed_shrink import routed_shrink, routing
from cram_kernels.expert_lora.triton import (
    NO_DROPOUT,
    PLANES_TOKENS,
    LayerBackward,
    kept_z,
    layer_backward,
    layer_gradients,
    operand,
)
from cram_kernels.launch import architecture, on_device_of
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
    seed: int,
) -> Tensor:
    """Compute the layer in Triton; arguments as in `cram_kernels.routed_expert_lora`, already checked."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    leaves = (rows, query, centroids, experts.trained_a, experts.trained_b)
    keep = torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in leaves)
    arguments: Any = (
        rows,
        query.float().contiguous(),
        centroids.float().contiguous(),
        experts.trained_a,
        experts.trained_b,
        weight,
        bias,
        experts.a,
        experts.bt,
        experts.expert_of_row,
        None if members is None else members.contiguous().view(torch.uint8),
        segments,
        float(sigma),
        experts.scale * (keep_scale(dropout) if dropout else 1.0),
        dropout,
        seed,
        keep,
    )
    if torch.compiler.is_compiling():
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
    seed: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return Y [T, D_out], then Z [1, T, pitch] and gates [S, E], empty and unset where nothing is kept."""
    with on_device_of(x):
        y = F.linear(x, weight, bias)
        gates = query.new_zeros(query.shape[0], centroids.shape[0])
        if not x.shape[0] or not a.shape[0]:
            return y, kept_z(x, [a], keep), gates
        arch, pitch = architecture(x.device), pitch_of([a.shape[0]])
        tile = tiles.shrink_tile(arch, x.dtype, x.shape[0], pitch, x.shape[1])
        folded = tile.split_k > 1 and (keep or x.shape[0] > PLANES_TOKENS)
        early = not keep and not folded and x.shape[0] <= PLANES_TOKENS and arch >= 90 and not interpreted()
        dtype = torch.float32 if tile.split_k > 1 else x.dtype
        z = x.new_empty(tile.split_k, 1, x.shape[0], pitch, dtype=dtype)
        route, drop = routing(query, centroids, sigma, members), dropout_words(dropout, seed)
        routed_shrink(x, operand(a, x), z, gates, route, drop, tile, dependents=early).run()
        if folded:
            planes, z = z, x.new_empty(1, *z.shape[1:])
            reduce_planes(planes, z).run()
        gate = gating(gates, (owner,), segments, scale)
        into = tiles.expand_tile(arch, x.dtype, x.shape[0])
        expand(z, (operand(bt, x),), y, gate, NO_DROPOUT, into, dependent=early, late_gates=True).run()
        return y, z[0] if keep else x.new_empty(0), gates


class _RoutedExpertLora(torch.autograd.Function):
    """Differentiable `_forward`; the registered operation shares its context and its backward."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, query, centroids, trained_a, trained_b, weight, _, a, bt, owner, _, segments = inputs[:12]
        leaves = (x, query, centroids, trained_a, trained_b)
        ctx.needs = [bool(leaf is not None and leaf.requires_grad) for leaf in leaves]
        ctx.trained = 0 if trained_a is None else trained_a.shape[0]
        ctx.sigma, *ctx.scalars = inputs[12:16]
        _, z, gates = output
        ctx.save_for_backward(
            x if ctx.needs[3] else None, z, gates, segments, query, centroids, weight, a, bt, owner
        )
        ctx.mark_non_differentiable(z, gates)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*_gradients(ctx, dy, layer_backward), *[None] * 12)


def _gradients(ctx: Any, dy: Tensor, backward: LayerBackward) -> list[Tensor | None]:
    """Return the gradients of x, query, centroids and the trained factors."""
    x, z, gates, segments, query, centroids, weight, a, bt, owner = ctx.saved_tensors
    need_x, need_query, need_centroids, need_a, need_b = ctx.needs
    needs = (need_x, need_query or need_centroids, need_a, need_b)
    dx, dgates, da, db = layer_gradients(
        backward,
        [dy],
        x,
        z,
        gates,
        [weight],
        [a],
        [bt],
        [owner],
        segments,
        [ctx.trained],
        *ctx.scalars,
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
    "float sigma, float scale, float dropout, SymInt seed, bool keep) -> (Tensor, Tensor, Tensor)"
)
for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("routed_expert_lora", _forward, _device)


def _forward_fake(x: Tensor, query: Tensor, centroids: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    weight, a, keep = arguments[2], arguments[4], arguments[-1]
    z = kept_z(x, [a], keep)
    return x.new_empty(x.shape[0], weight.shape[0]), z, query.new_empty(query.shape[0], centroids.shape[0])


def _op_backward(ctx: Any, dy: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*_gradients(ctx, dy, torch.ops.cram.expert_lora_backward), *[None] * 12)


torch.library.register_fake("cram::routed_expert_lora", _forward_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "cram::routed_expert_lora", _op_backward, setup_context=_RoutedExpertLora.setup_context, lib=_LIBRARY
)
