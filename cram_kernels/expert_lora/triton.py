"""expert_lora on Triton kernels: SHRINK and EXPAND around the base linear, GRAM for the trained suffix.

    forward     Y_p = X W_p^T + b_p (BLAS)    Z_p = drop(X) A_p^T    Y_p += (Z_p o w_p) Bt_p  in place
    backward    dX = sum_p dY_p W_p (BLAS)    V_p = dY_p Bt_p^T      dg from Z_p o V_p
                dA_p and dBt_p in one launch                         dX += drop(sum_p (V_p o w_p) A_p)

p runs over projections that read the same x (one, or q, k and v). Passes over an activation beyond the base
linear's for one projection: 3 forward, 5 backward. A stack reads X once in the forward and adds to dX once.

Saved: x if a suffix trains A, Z [T, R], the gates. Everything that runs lies in two functional operations,
`cram::expert_lora` and `cram::expert_lora_backward`, which a compiler sees whole. Eager calls reach the same
Python functions through an autograd Function, which costs the host less than the dispatcher does.

Inference with T <= 64 is the decode path: two launches back to back, of which the second starts before the
first has ended (sm_90), Z staying in the planes of its split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cram_kernels.dispatch import interpreted
from cram_kernels.expert_lora import tiles
from cram_kernels.expert_lora.dropout import keep_scale
from cram_kernels.expert_lora.kernels.expand import expand
from cram_kernels.expert_lora.kernels.gate_gradient import gate_gradient
from cram_kernels.expert_lora.kernels.gating import Dropout, Gating, dropout_words, gating, pitch_of
from cram_kernels.expert_lora.kernels.gram import gram, reduce_planes
from cram_kernels.expert_lora.kernels.shrink import shrink
from cram_kernels.launch import architecture, on_device_of
from cram_kernels.packing import PackedExperts

# From here on casting the float32 experts once, in a launch, costs less than casting their tiles everywhere.
CAST_TOKENS = 1024
# Up to here EXPAND adds the planes of a split SHRINK itself; beyond, a launch of its own does.
PLANES_TOKENS = 64
# Rank tiles without a live gate can be left out only where R takes more than one.
SKIP_RANK = 128
MAX_STACK = 3
NO_DROPOUT = dropout_words(0.0, 0)


LayerBackward = Callable[..., list[Tensor]]


def expert_lora(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    experts: PackedExperts,
    gates: Tensor,
    segments: Tensor | None,
    dropout: float,
    seed: int,
) -> Tensor:
    """Compute the layer in Triton; arguments as in `cram_kernels.expert_lora`, already checked."""
    return stacked_expert_lora(x, [(weight, bias, experts)], gates, segments, dropout, seed)[0]


def stacked_expert_lora(
    x: Tensor,
    layers: Sequence[tuple[Tensor, Tensor | None, PackedExperts]],
    gates: Tensor,
    segments: Tensor | None,
    dropout: float,
    seed: int,
) -> list[Tensor]:
    """Compute up to three layers that read the same x; arguments as in `cram_kernels.stacked_expert_lora`."""
    stack = [experts for _, _, experts in layers]
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    trained: list[Tensor | None] = [leaf for e in stack for leaf in (e.trained_a, e.trained_b)]
    keep = torch.is_grad_enabled() and (
        x.requires_grad or gates.requires_grad or any(leaf is not None for leaf in trained)
    )
    arguments: Any = (
        rows,
        gates,
        *trained,
        *[None] * (2 * (MAX_STACK - len(stack))),
        [weight for weight, _, _ in layers],
        [weight[:0, 0] if bias is None else bias for weight, bias, _ in layers],
        [e.a for e in stack],
        [e.bt for e in stack],
        [e.expert_of_row for e in stack],
        segments,
        stack[0].scale * (keep_scale(dropout) if dropout else 1.0),
        dropout,
        seed,
        keep,
    )
    if torch.compiler.is_compiling():
        outputs = torch.ops.cram.expert_lora(*arguments)
    else:
        outputs = _ExpertLora.apply(*arguments) if keep else _forward(*arguments)
    return [y.view(*x.shape[:-1], y.shape[1]) for y in outputs[: len(stack)]]


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
    seed: int,
    keep: bool,
) -> list[Tensor]:
    """Return every Y_p [T, D_out_p], then Z [STACK, T, pitch] (empty where nothing is kept for backward)."""
    with on_device_of(x):
        bases = zip(weights, biases, strict=True)
        outputs = [F.linear(x, weight, bias if bias.numel() else None) for weight, bias in bases]
        if not x.shape[0] or not any(factor.shape[0] for factor in a):
            return [*outputs, kept_z(x, a, keep)]
        arch, gate = architecture(x.device), gating(gates, owners, segments, scale)
        # A first layer without rows would not wait for SHRINK, and nothing behind it would.
        early = not keep and a[0].shape[0] > 0 and x.shape[0] <= PLANES_TOKENS
        early = early and arch >= 90 and not interpreted()
        z = _project(x, a, gate, dropout_words(dropout, seed), skip=not keep, fold=keep, dependents=early)
        tile = tiles.expand_tile(arch, x.dtype, x.shape[0])
        for p, y in enumerate(outputs):
            of_p = gate._replace(owner=(owners[p],))
            factors = (operand(bt[p], x),)
            expand(z[:, p : p + 1], factors, y, of_p, NO_DROPOUT, tile, dependent=early and p == 0).run()
        return [*outputs, z[0] if keep else x.new_empty(0)]


def kept_z(x: Tensor, a: Sequence[Tensor], keep: bool) -> Tensor:
    """Return memory for the Z [STACK, T, pitch] that backward reads; empty if nothing is kept or R is 0."""
    if not keep or not any(factor.shape[0] for factor in a):
        return x.new_empty(0)
    return x.new_empty(len(a), x.shape[0], pitch_of([factor.shape[0] for factor in a]))


def layer_backward(
    dys: list[Tensor],
    x: Tensor | None,
    z: Tensor,
    gates: Tensor,
    weights: list[Tensor],
    a: list[Tensor],
    bt: list[Tensor],
    owners: list[Tensor],
    segments: Tensor | None,
    trained: list[int],
    scale: float,
    dropout: float,
    seed: int,
    need_x: bool,
    need_gates: bool,
    need_a: bool,
    need_b: bool,
) -> list[Tensor]:
    """Return dX, dg, then dA_p and dBt_p of every projection; empty where not needed."""
    first = dys[0]
    with on_device_of(first):
        gate, drop = gating(gates, owners, segments, scale), dropout_words(dropout, seed)
        dx = _base_gradient(dys, weights) if need_x else first.new_empty(0)
        new = torch.Tensor.new_empty if z.numel() else torch.Tensor.new_zeros
        dgates = new(gates, gates.shape if need_gates else (0,))
        factors = [
            new(a_p, (r if need else 0, side.shape[1]))
            for a_p, bt_p, r in zip(a, bt, trained, strict=True)
            for side, need in ((a_p, need_a), (bt_p, need_b))
        ]
        if not z.numel():
            return [dx, dgates, *factors]
        v = torch.empty_like(z)
        if need_x or need_gates or need_a:
            for p, dy in enumerate(dys):
                of_p = gate._replace(owner=(owners[p],))
                _project(dy, [bt[p]], of_p, NO_DROPOUT, skip=not need_gates, out=v[p])
        if need_gates:
            dgates = _gate_gradient(z, v, gate)
        for p, dy in enumerate(dys):
            if trained[p]:
                of_p = gate._replace(owner=(owners[p],))
                sides = ((v[p], x) if need_a else None, (z[p], dy) if need_b else None)
                _factor_gradients(sides, of_p, drop, trained[p], factors[2 * p : 2 * p + 2])
        if need_x:
            tile = tiles.expand_tile(architecture(dx.device), dx.dtype, dx.shape[0])
            expand(v.unsqueeze(0), tuple(operand(each, dx) for each in a), dx, gate, drop, tile).run()
        return [dx, dgates, *factors]


def _project(
    x: Tensor,
    factors: Sequence[Tensor],
    gate: Gating,
    drop: Dropout,
    *,
    skip: bool,
    fold: bool = True,
    dependents: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Run SHRINK; return Z [planes, STACK, T, pitch]: one plane if `fold` or T is large, else the split's."""
    tokens, width = x.shape
    pitch = out.shape[-1] if out is not None else pitch_of([f.shape[0] for f in factors])
    tile = tiles.shrink_tile(architecture(x.device), x.dtype, tokens, pitch, width)
    z = x.new_empty(1, len(factors), tokens, pitch) if out is None else out.view(1, 1, tokens, pitch)
    same = all(factor.dtype == factors[0].dtype for factor in factors)
    operands = tuple(operand(factor if same else factor.to(x.dtype), x) for factor in factors)
    options = {"skip": skip and pitch > SKIP_RANK, "dependents": dependents}
    if tile.split_k == 1:
        shrink(x, operands, z, gate, drop, tile, **options).run()
        return z
    planes = x.new_empty(tile.split_k, *z.shape[1:], dtype=torch.float32)
    shrink(x, operands, planes, gate, drop, tile, **options).run()
    if not fold and tokens <= PLANES_TOKENS:
        return planes
    reduce_planes(planes, z).run()
    return z


def operand(factor: Tensor, x: Tensor) -> Tensor:
    """Return the factor as the kernels should read it: cast in a launch of its own where that is cheaper."""
    return (factor.to(x.dtype) if x.shape[0] >= CAST_TOKENS else factor).contiguous()


def _base_gradient(dys: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    dx = dys[0] @ weights[0]
    for dy, weight in zip(dys[1:], weights[1:], strict=True):
        dx.addmm_(dy, weight)
    return dx


def _gate_gradient(z: Tensor, v: Tensor, gate: Gating) -> Tensor:
    """Return dg [S, E]; projections of a stack share their gates, so their gradients add."""
    parts = gate.gates.new_empty(z.shape[0], *gate.gates.shape)
    for p, part in enumerate(parts):
        for launch in gate_gradient(z[p], v[p], part, gate._replace(owner=(gate.owner[p],))):
            launch.run()
    return parts[0] if len(parts) == 1 else parts.sum(0)


def _factor_gradients(
    sides: Sequence[tuple[Tensor, Tensor | None] | None],
    gate: Gating,
    drop: Dropout,
    count: int,
    grads: Sequence[Tensor],
) -> None:
    """Fill dA and dBt of one projection's last `count` rows; leave out what has a side of None."""
    chosen = [(side, grad) for side, grad in zip(sides, grads, strict=True) if side is not None]
    if not chosen:
        return
    lefts, rights = zip(*(side for side, _ in chosen), strict=True)
    rows, width = rights[0].shape[0], sum(right.shape[1] for right in rights)
    tile = tiles.gram_tile(architecture(rights[0].device), rights[0].dtype, rows, width)
    planes = rights[0].new_empty(tile.split_t, count * width, dtype=torch.float32)
    first = gate.owner[0].shape[0] - count
    gram(lefts, rights, planes, gate, drop if sides[0] is not None else NO_DROPOUT, first, tile).run()
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
        ctx.scalars = inputs[14:17]
        ctx.save_for_backward(
            x if any(ctx.needs[2::2]) else None, output[-1], gates, segments, *weights, *a, *bt, *owners
        )
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*_gradients(ctx, grads[:-1], layer_backward), *[None] * 10)


def _gradients(ctx: Any, grads: Sequence[Tensor | None], backward: LayerBackward) -> list[Tensor | None]:
    """Return the gradients of x, gates and the three pairs of trained factors."""
    x, z, gates, segments, *lists = ctx.saved_tensors
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
            backward, dys, x, z, gates, weights, a, bt, owners, segments, ctx.trained, *ctx.scalars, *needs
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
    "Tensor[] a, Tensor[] bt, Tensor[] owners, Tensor? segments, float scale, float dropout, SymInt seed, "
    "bool keep) -> Tensor[]"
)
_LIBRARY.define(
    "expert_lora_backward(Tensor[] dys, Tensor? x, Tensor z, Tensor gates, Tensor[] weights, Tensor[] a, "
    "Tensor[] bt, Tensor[] owners, Tensor? segments, int[] trained, float scale, float dropout, SymInt seed, "
    "bool need_x, bool need_gates, bool need_a, bool need_b) -> Tensor[]"
)
for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("expert_lora", _forward, _device)
    _LIBRARY.impl("expert_lora_backward", layer_backward, _device)


def _forward_fake(x: Tensor, *arguments: Any) -> list[Tensor]:
    weights, _, a = arguments[7:10]
    outputs = [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]
    return [*outputs, kept_z(x, a, arguments[-1])]


def _backward_fake(
    dys: list[Tensor], x: Tensor | None, z: Tensor, gates: Tensor, *arguments: Any
) -> list[Tensor]:
    weights, a, bt, _, _, trained, _, _, _, need_x, need_gates, need_a, need_b = arguments
    factors = [
        a_p.new_empty(r if need else 0, side.shape[1])
        for a_p, bt_p, r in zip(a, bt, trained, strict=True)
        for side, need in ((a_p, need_a), (bt_p, need_b))
    ]
    dx = dys[0].new_empty((dys[0].shape[0], weights[0].shape[1]) if need_x else 0)
    return [dx, gates.new_empty(gates.shape if need_gates else 0), *factors]


def _op_backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    lists = [[None] * len(ctx.trained)] * 5
    return (*_gradients(ctx, grads[:-1], torch.ops.cram.expert_lora_backward), *lists, *[None] * 5)


def _no_second_derivative(ctx: Any, *grads: Any) -> None:
    raise RuntimeError("expert_lora must be differentiated once, got a second derivative")


torch.library.register_fake("cram::expert_lora", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("cram::expert_lora_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "cram::expert_lora", _op_backward, setup_context=_ExpertLora.setup_context, lib=_LIBRARY
)
torch.library.register_autograd("cram::expert_lora_backward", _no_second_derivative, lib=_LIBRARY)
