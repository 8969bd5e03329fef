"""expert_lora on Triton kernels: SHRINK and EXPAND around the base linear, GRAM for the trained suffix.

    forward     Z_p = drop(X) A_p^T     U_p = Z_p o w_p       Y_p = X W_p^T + b_p (BLAS)
                Y_p += U_p Bt_p in place
    backward    V_p = dY_p Bt_p^T       dZ_p = V_p o w_p      dg from Z_p o V_p
                dA_p and dBt_p          dX = sum_p dY_p W_p (BLAS)
                dX += drop(sum_p dZ_p A_p) in place

p runs over projections that read the same x (one, or q, k and v). Passes over an activation beyond the base
linear's for one projection: 3 forward, 5 backward. A stack reads X once in the forward, adds to its Y in one
launch, and adds to dX once. Long inputs run in chunks of tokens, or with the base product last
(`tiles.ORDER`).

Saved: x if a suffix trains A, Z [T, R], the gates, the dropout mask as bits. Everything that runs lies in two
functional operations, `cram::expert_lora` and `cram::expert_lora_backward`, which a compiler sees whole.
Eager calls reach the same Python functions through an autograd Function, which costs the host less than the
dispatcher does.

Inference with T <= 64 is `decode`: two launches, U staying in the planes of its split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cram_kernels.expert_lora import tiles
from cram_kernels.expert_lora.decode import PLANES_TOKENS, SKIP_RANK, decode, linear, new_planes, operands
from cram_kernels.expert_lora.dropout import keep_scale
from cram_kernels.expert_lora.kernels.dropout import bits_pitch, dropout_bits
from cram_kernels.expert_lora.kernels.fold import fold
from cram_kernels.expert_lora.kernels.gate_gradient import gate_gradient
from cram_kernels.expert_lora.kernels.gating import Gating, gating, pitch_of
from cram_kernels.expert_lora.kernels.gram import gram, reduce_planes
from cram_kernels.expert_lora.kernels.shrink import shrink
from cram_kernels.expert_lora.outputs import base_gradient, forward_outputs, input_gradient
from cram_kernels.launch import architecture, on_device_of
from cram_kernels.once import no_second_derivative, once_differentiable
from cram_kernels.packing import PackedExperts

MAX_STACK = 3


LayerBackward = Callable[..., list[Tensor]]


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
    """Compute the layer in Triton; arguments as in `cram_kernels.expert_lora`, already checked."""
    return stacked_expert_lora(x, [(weight, bias, experts)], gates, segments, dropout, seed)[0]


def stacked_expert_lora(
    x: Tensor,
    layers: Sequence[tuple[Tensor, Tensor | None, PackedExperts]],
    gates: Tensor,
    segments: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> list[Tensor]:
    """Compute up to three layers that read the same x; arguments as in `cram_kernels.stacked_expert_lora`."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    sides: list[Any] = [list(side) for side in zip(*(p.factors() for _, _, p in layers), strict=True)]
    a, bt, *leaves = sides
    trained = [leaf for pair in zip(*leaves, strict=True) for leaf in pair]
    keep = torch.is_grad_enabled() and (
        x.requires_grad or gates.requires_grad or any(leaf is not None for leaf in trained)
    )
    weights = [weight for weight, _, _ in layers]
    # nn.Module finds a buffer by name after its own attributes, at a microsecond each.
    owners: list[Any] = [experts._buffers["expert_of_row"] for _, _, experts in layers]
    scale, compiling = layers[0][2].scale, torch.compiler.is_compiling()
    if not (keep or dropout or compiling) and 0 < rows.shape[0] <= PLANES_TOKENS and any(map(len, a)):
        with on_device_of(x):
            biases = [bias for _, bias, _ in layers]
            ys = decode(rows, gates, weights, biases, a, bt, owners, segments, scale, architecture(x.device))
        return ys if rows is x else [y.view(*x.shape[:-1], y.shape[1]) for y in ys]
    arguments: Any = (
        rows,
        gates,
        *trained,
        *[None] * (2 * (MAX_STACK - len(layers))),
        weights,
        [weight[:0, 0] if bias is None else bias for weight, bias, _ in layers],
        a,
        bt,
        owners,
        segments,
        scale * (keep_scale(dropout) if dropout else 1.0),
        dropout,
        seed,
        keep,
    )
    if compiling:
        outputs = torch.ops.cram.expert_lora(*arguments)
    else:
        outputs = _ExpertLora.apply(*arguments) if keep else _forward(*arguments)
    return [y.view(*x.shape[:-1], y.shape[1]) for y in outputs[: len(layers)]]


def _forward(
    x: Tensor,
    gates: Tensor,
    trained_a0: Tensor | None,
    trained_b0: Tensor | None,
    trained_a1: Tensor | None,
    trained_b1: Tensor | None,
    trained_a2: Tensor | None,
    trained_b2: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor],
    a: list[Tensor],
    bt: list[Tensor],
    owners: list[Tensor],
    segments: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    keep: bool,
) -> list[Tensor]:
    """Return every Y_p [T, D_out_p], then Z [STACK, T, pitch] and the dropout bits, empty if not kept."""
    with on_device_of(x):
        if not x.shape[0] or not any(factor.shape[0] for factor in a):
            outputs = [linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
            return [*outputs, kept_z(x, a, keep), kept_bits(x, dropout, keep)]
        arch, bits = architecture(x.device), mask_bits(x, dropout, seed)
        if keep or x.shape[0] > PLANES_TOKENS:
            gate = gating(gates, owners, segments, scale)
            z, u = project(x, operands(a, x), gate, bits=bits, skip=not keep, keep=keep)
            outputs = forward_outputs(x, weights, biases, bt, u, gate, arch)
            kept = kept_bits(x, dropout, keep) if bits is None or not keep else bits
            return [*outputs, x.new_empty(0) if z is None else z, kept]
        ys = decode(x, gates, weights, biases, a, bt, owners, segments, scale, arch, bits=bits)
        return [*ys, x.new_empty(0), kept_bits(x, dropout, keep)]


def mask_bits(x: Tensor, dropout: float, seed: Tensor | None) -> Tensor | None:
    """Return the dropout mask of x as bits; None without dropout."""
    if seed is None:
        return None
    bits = torch.empty(x.shape[0], bits_pitch(x.shape[1]), dtype=torch.uint8, device=x.device)
    dropout_bits(bits, dropout, int(seed)).run()
    return bits


def kept_z(x: Tensor, a: Sequence[Tensor], keep: bool) -> Tensor:
    """Return memory for the Z [STACK, T, pitch] that backward reads; empty if nothing is kept or R is 0."""
    if not keep or not any(factor.shape[0] for factor in a):
        return x.new_empty(0)
    return x.new_empty(len(a), x.shape[0], pitch_of([factor.shape[0] for factor in a]))


def kept_bits(x: Tensor, dropout: float, keep: bool) -> Tensor:
    """Return memory for the dropout bits that backward reads; empty if there are none."""
    shape = (x.shape[0], bits_pitch(x.shape[1])) if keep and dropout else (0,)
    return x.new_empty(shape, dtype=torch.uint8)


def project(
    x: Tensor, factors: Sequence[Tensor], gate: Gating, *, bits: Tensor | None, skip: bool, keep: bool
) -> tuple[Tensor | None, Tensor]:
    """Return Z [STACK, T, pitch], None unless it is kept, and U [1, STACK, T, pitch]."""
    tokens, width = x.shape
    ranks = [factor.shape[0] for factor in factors]
    pitch = pitch_of(ranks)
    tile = tiles.shrink_tile(architecture(x.device), x.dtype, tokens, pitch, width)
    planes = new_planes(x, tile.split_k, len(factors), pitch)
    whole = tile.split_k == 1
    gated, skip = whole and not keep, skip and pitch > SKIP_RANK
    shrink(x, factors, planes, gate, tile, bits=bits, skip=skip, gated=gated).run()
    if gated:
        return None, planes
    u = new_planes(x, 1, len(factors), pitch)
    z = None if not keep else planes[0] if whole else torch.empty_like(u[0])
    fold(planes, None if whole else z, u[0], gate, ranks).run()
    return z, u


def layer_backward(
    dys: list[Tensor],
    x: Tensor | None,
    z: Tensor,
    bits: Tensor,
    gates: Tensor,
    weights: list[Tensor],
    a: list[Tensor],
    bt: list[Tensor],
    owners: list[Tensor],
    segments: Tensor | None,
    trained: list[int],
    scale: float,
    need_x: bool,
    need_gates: bool,
    need_a: bool,
    need_b: bool,
) -> list[Tensor]:
    """Return dX, dg, then dA_p and dBt_p of every projection; empty where not needed."""
    first = dys[0]
    with on_device_of(first):
        new = torch.Tensor.new_empty if z.numel() else torch.Tensor.new_zeros
        dgates = new(gates, gates.shape if need_gates else (0,))
        factors = [
            new(a_p, (r if need else 0, side.shape[1]))
            for a_p, bt_p, r in zip(a, bt, trained, strict=True)
            for side, need in ((a_p, need_a), (bt_p, need_b))
        ]
        if not z.numel():
            dx = base_gradient(dys, weights) if need_x else first.new_empty(0)
            return [dx, dgates, *factors]
        gate, mask = gating(gates, owners, segments, scale), bits if bits.numel() else None
        dz = torch.empty_like(z)
        v = torch.empty_like(z) if need_gates else None
        if need_x or need_gates or need_a:
            for p, dy in enumerate(dys):
                of_p = gate._replace(owner=(owners[p],))
                _back_project(dy, bt[p], of_p, dz[p], None if v is None else v[p])
        if v is not None:
            dgates = _gate_gradient(z, v, gate)
        if need_b and any(trained):
            u = torch.empty_like(z)
            fold(z.unsqueeze(0), None, u, gate, [a_p.shape[0] for a_p in a]).run()
        for p, dy in enumerate(dys):
            if trained[p]:
                sides = ((dz[p], x) if need_a else None, (u[p], dy) if need_b else None)
                begin = bt[p].shape[0] - trained[p]
                _factor_gradients(sides, mask, begin, trained[p], factors[2 * p : 2 * p + 2])
        dx = (
            input_gradient(dys, weights, dz, a, mask, gate, architecture(first.device))
            if need_x
            else first.new_empty(0)
        )
        return [dx, dgates, *factors]


def _back_project(dy: Tensor, bt: Tensor, gate: Gating, dz: Tensor, v: Tensor | None) -> None:
    """Fill dZ [T, pitch] of one projection, and V where it is wanted."""
    (tokens, width), pitch = dy.shape, dz.shape[1]
    tile = tiles.shrink_tile(architecture(dy.device), dy.dtype, tokens, pitch, width)
    whole, skip = tile.split_k == 1, v is None and pitch > SKIP_RANK
    own = (dz if v is None else v).view(1, 1, tokens, pitch)
    planes = own if whole else new_planes(dy, tile.split_k, 1, pitch)
    gated = whole and v is None
    shrink(dy, operands([bt], dy), planes, gate, tile, skip=skip, gated=gated).run()
    if not gated:
        fold(planes, None if whole or v is None else v[None], dz[None], gate, [bt.shape[0]]).run()


def _gate_gradient(z: Tensor, v: Tensor, gate: Gating) -> Tensor:
    """Return dg [S, E]; projections of a stack share their gates, so their gradients add."""
    parts = gate.gates.new_empty(z.shape[0], *gate.gates.shape)
    for p, part in enumerate(parts):
        for launch in gate_gradient(z[p], v[p], part, gate._replace(owner=(gate.owner[p],))):
            launch.run()
    return parts[0] if len(parts) == 1 else parts.sum(0)


def _factor_gradients(
    sides: Sequence[tuple[Tensor, Tensor | None] | None],
    bits: Tensor | None,
    first: int,
    count: int,
    grads: Sequence[Tensor],
) -> None:
    """Fill dA and dBt of one projection's `count` rows from `first` on; leave out what has a side of None."""
    chosen = [(side, grad) for side, grad in zip(sides, grads, strict=True) if side is not None]
    if not chosen:
        return
    lefts, rights = zip(*(side for side, _ in chosen), strict=True)
    rows, width = rights[0].shape[0], sum(right.shape[1] for right in rights)
    tile = tiles.gram_tile(architecture(rights[0].device), rights[0].dtype, rows, width)
    planes = rights[0].new_empty(tile.split_t, count * width, dtype=torch.float32)
    gram(lefts, rights, planes, first, tile, bits=bits if sides[0] is not None else None).run()
    reduce_planes(planes, *(grad for _, grad in chosen)).run()


class _ExpertLora(torch.autograd.Function):
    """Differentiable `_forward`; the registered operation shares its context and its backward."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return tuple(_forward(*inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
        x, gates, *trained = inputs[:8]
        weights, _, a, bt, owners, segments = inputs[8:14]
        ctx.needs = [bool(t is not None and t.requires_grad) for t in (x, gates, *trained)]
        ctx.trained = [0 if factor is None else factor.shape[0] for factor in trained[0 : 2 * len(a) : 2]]
        ctx.scale = inputs[14]
        ctx.save_for_backward(
            x if any(ctx.needs[2::2]) else None, *output[-2:], gates, segments, *weights, *a, *bt, *owners
        )
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*_gradients(ctx, grads[:-2], layer_backward), *[None] * 10)


def _gradients(ctx: Any, grads: Sequence[Tensor | None], backward: LayerBackward) -> list[Tensor | None]:
    """Return the gradients of x, gates and the three pairs of trained factors."""
    x, z, bits, gates, segments, *lists = ctx.saved_tensors
    count = len(grads)
    weights, a, bt, owners = (lists[i * count : (i + 1) * count] for i in range(4))
    rows = z.shape[1] if z.numel() else next(g.shape[0] for g in grads if g is not None)
    dys = [
        weight.new_zeros(rows, weight.shape[0]) if dy is None else dy
        for dy, weight in zip(grads, weights, strict=True)
    ]
    needs = (ctx.needs[0], ctx.needs[1], any(ctx.needs[2::2]), any(ctx.needs[3::2]))
    found: list[Tensor | None] = [
        *layer_gradients(
            backward, dys, x, z, bits, gates, weights, a, bt, owners, segments, ctx.trained, ctx.scale, *needs
        )
    ]
    found += [None] * (8 - len(found))
    return [grad if need else None for grad, need in zip(found, ctx.needs, strict=True)]


def layer_gradients(backward: LayerBackward, dys: Sequence[Tensor], *arguments: Any) -> list[Tensor]:
    """Run `layer_backward`, or the operation that is registered for it, on gradients of any layout."""
    rows = [dy if dy.stride(1) == 1 else dy.contiguous() for dy in dys]
    with torch.autocast(rows[0].device.type, enabled=False):
        return backward(rows, *arguments)


_LIBRARY = torch.library.Library("cram", "FRAGMENT")
_LIBRARY.define(
    "expert_lora(Tensor x, Tensor gates, Tensor? trained_a0, Tensor? trained_b0, Tensor? trained_a1, "
    "Tensor? trained_b1, Tensor? trained_a2, Tensor? trained_b2, Tensor[] weights, Tensor[] biases, "
    "Tensor[] a, Tensor[] bt, Tensor[] owners, Tensor? segments, float scale, float dropout, Tensor? seed, "
    "bool keep) -> Tensor[]"
)
_LIBRARY.define(
    "expert_lora_backward(Tensor[] dys, Tensor? x, Tensor z, Tensor bits, Tensor gates, Tensor[] weights, "
    "Tensor[] a, Tensor[] bt, Tensor[] owners, Tensor? segments, int[] trained, float scale, bool need_x, "
    "bool need_gates, bool need_a, bool need_b) -> Tensor[]"
)
for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("expert_lora", _forward, _device)
    _LIBRARY.impl("expert_lora_backward", layer_backward, _device)


def _forward_fake(x: Tensor, *arguments: Any) -> list[Tensor]:
    weights, _, a = arguments[7:10]
    outputs = [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]
    dropout, keep = arguments[-3], arguments[-1]
    return [*outputs, kept_z(x, a, keep), kept_bits(x, dropout, keep)]


def _backward_fake(
    dys: list[Tensor], x: Tensor | None, z: Tensor, bits: Tensor, gates: Tensor, *arguments: Any
) -> list[Tensor]:
    weights, a, bt, _, _, trained, _, need_x, need_gates, need_a, need_b = arguments
    factors = [
        a_p.new_empty(r if need else 0, side.shape[1])
        for a_p, bt_p, r in zip(a, bt, trained, strict=True)
        for side, need in ((a_p, need_a), (bt_p, need_b))
    ]
    dx = dys[0].new_empty((dys[0].shape[0], weights[0].shape[1]) if need_x else 0)
    return [dx, gates.new_empty(gates.shape if need_gates else 0), *factors]


def _op_backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    lists = [[None] * len(ctx.trained)] * 5
    return (*_gradients(ctx, grads[:-2], torch.ops.cram.expert_lora_backward), *lists, *[None] * 5)


torch.library.register_fake("cram::expert_lora", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("cram::expert_lora_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "cram::expert_lora", _op_backward, setup_context=_ExpertLora.setup_context, lib=_LIBRARY
)
torch.library.register_autograd("cram::expert_lora_backward", no_second_derivative, lib=_LIBRARY)
