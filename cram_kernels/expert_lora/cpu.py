"""expert_lora, rank-packed: two small products beside the base linear, whatever the number of experts.

    Z = drop(X) A^T        U = Z o (g s)[:, expert_of_row]        Y = X W0^T + b + U Bt
    V = dY Bt^T            dZ = V o (g s)[:, expert_of_row]       dX = dY W0 + drop(dZ A)
    dg_e = s * sum of Z o V over the expert's rows and the segment's tokens
    dA = dZ^T drop(X)      dBt = U^T dY      both for the trained suffix only

One autograd Function owns the base linear, so that the expand adds into its result in place and dX is
accumulated in place too. Saved: the columns of Z that backward needs (all of them for gate gradients, else
the trained ones), the gates, and x if the trained suffix needs it; U, the dropout mask and low-precision
copies of the experts are made again. FLOPs: 2 T R (D_in + D_out) beyond the base linear, bytes saved T R
elements.

With a shared A [r, D_in], read by the E branches of Bt [E r, D_out], there is one shrink Z [T, r], which
stands above for its E copies; dZ [T, r] and with it dA sum over the branches. Saved: Z [T, r].

A gate of exactly 0 selects. Experts with gate 0 for all rows are left out of inference calls and masked
otherwise; rows whose trained gates are all 0 are left out of dBt and dA (those whose gates are all 0, of the
dA of a shared A).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cram_kernels.expert_lora.dropout import dropout_mask, keep_scale
from cram_kernels.once import once_differentiable
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
    """Compute the layer on packed ranks; arguments as in `cram_kernels.expert_lora`, already checked."""
    a, bt, trained_a, trained_b = experts.factors()
    owner = experts.expert_of_row
    scale = experts.scale * (keep_scale(dropout) if dropout else 1.0)
    if torch.is_grad_enabled() and (x.requires_grad or gates.requires_grad or trained_a is not None):
        return _ExpertLora.apply(
            x, gates, trained_a, trained_b, weight, bias, a, bt, owner, segments, scale, dropout, seed
        )
    zeros = _may_be_zero(gates)
    if zeros and _surely(~(live := _live_rows(gates, owner)).all()):
        kept = live.nonzero().squeeze(1)
        a = a if experts.shared_a else a[kept]
        bt, owner = bt[kept], owner[kept]
    rows = x.reshape(-1, x.shape[-1])
    y = F.linear(rows, weight, bias)
    z = _copied(F.linear(_drop(rows, dropout, seed), a.to(x.dtype)), len(owner))
    w = _row_gates(gates, owner, scale)
    y.addmm_(_gated(z, w, segments, zeros), _mask_dead(bt, gates, owner, zeros).to(x.dtype))
    return y.view(*x.shape[:-1], y.shape[1])


class _ExpertLora(torch.autograd.Function):
    """Base linear and packed experts with one hand-written backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gates: Tensor,
        trained_a: Tensor | None,
        trained_b: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        bt: Tensor,
        owner: Tensor,
        segments: Tensor | None,
        scale: float,
        dropout: float,
        seed: Tensor | None,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = F.linear(rows, weight, bias)
        z = F.linear(_drop(rows, dropout, seed), a.to(x.dtype))
        zeros = _may_be_zero(gates)
        u = _gated(_copied(z, len(owner)), _row_gates(gates, owner, scale), segments, zeros)
        y.addmm_(u, _mask_dead(bt, gates, owner, zeros).to(x.dtype))
        _, need_gates, need_a, need_b = ctx.needs_input_grad[:4]
        tail = bt.shape[0] - (trained_b.shape[0] if trained_b is not None else 0)
        whole = need_gates or (need_b and len(a) != len(bt))
        kept = z if whole else z[:, tail:].clone() if need_b else None
        ctx.save_for_backward(x if need_a else None, kept, gates, segments, owner, weight, a, bt, seed)
        ctx.shape, ctx.tail, ctx.zeros = x.shape, tail, zeros
        ctx.scale, ctx.dropout = scale, dropout
        return y.view(*x.shape[:-1], y.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(dy.device.type, enabled=False):
            return (*_backward(ctx, dy), *[None] * 9)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, gates, trained_a and trained_b."""
    x, z, gates, segments, owner, weight, a, bt, seed = ctx.saved_tensors
    need_x, need_gates, need_a, need_b = ctx.needs_input_grad[:4]
    tail, rank = ctx.tail, bt.shape[0]
    shared = len(a) != rank
    tail_a = 0 if shared else tail
    dx = dgates = da = db = None
    dy = dy.reshape(-1, dy.shape[-1])
    first = 0 if need_x or need_gates else tail_a
    v = F.linear(dy, bt[first:].to(dy.dtype)) if need_x or need_gates or need_a else None
    w = _row_gates(gates, owner, ctx.scale)
    keep = None
    if seed is not None:
        keep = dropout_mask(seed, *_flat(ctx.shape), ctx.dropout, dy.device, dy.dtype)
    if v is not None and need_gates:
        dgates = _gate_gradient(_copied(z, rank), v, gates, segments, owner, ctx.scale)
    dz = _gated(v, w[:, first:], segments, ctx.zeros) if v is not None and (need_x or need_a) else None
    if shared and dz is not None:
        dz = dz.reshape(len(dy), rank // max(len(a), 1), len(a)).sum(1)
    if need_x and dz is not None:
        dx = _input_gradient(dy, dz, weight, _mask_dead(a, gates, owner, ctx.zeros), keep).view(ctx.shape)
    busy = _busy_tokens(w[:, tail:], len(dy), segments) if ctx.zeros and (need_a or need_b) else None
    if need_a and dz is not None:
        rows = x.reshape(_flat(ctx.shape))
        rows = rows if keep is None else rows * keep
        used = _busy_tokens(w, len(dy), segments) if shared and ctx.zeros else busy
        dz = dz if tail_a == first else dz[:, tail_a - first :]
        da = _gram(dz, rows, used).to(a.dtype)
    if need_b:
        columns = _copied(z, rank - tail) if shared else z[:, tail:] if z.shape[1] == rank else z
        db = _gram(_gated(columns, w[:, tail:], segments, ctx.zeros), dy, busy).to(bt.dtype)
    return dx, dgates, da, db


def _flat(shape: torch.Size) -> tuple[int, int]:
    return shape[:-1].numel(), shape[-1]


def _drop(rows: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """Zero the dropped elements; the scale 1 / (1 - p) rides on the gates."""
    if seed is None:
        return rows
    return rows * dropout_mask(seed, rows.shape[0], rows.shape[1], dropout, rows.device, rows.dtype)


def _copied(z: Tensor, rows: int) -> Tensor:
    """Z [T, r] of a shared A once for each of the branches that have `rows` rows together; else Z itself."""
    return z if z.shape[1] == rows else z.repeat(1, rows // z.shape[1])


def _row_gates(gates: Tensor, owner: Tensor, scale: float) -> Tensor:
    """Gates of every packed row, times the scale: [S, R]."""
    return gates.index_select(1, owner).mul_(scale)


def _gated(m: Tensor, w: Tensor, segments: Tensor | None, zeros: bool) -> Tensor:
    """Multiply m [T, R] by its segments' row gates w [S, R] in the gates' precision; result in m's dtype."""
    if segments is not None:
        w = w.index_select(0, segments)
    tokens, groups = m.shape[0], w.shape[0]
    if groups in (1, tokens):
        out = m * w
    else:
        m3, w = m.reshape(groups, tokens // groups, m.shape[1]), w.unsqueeze(1)
        out = m3 * w
    if zeros:
        out.masked_fill_(w == 0, 0)
    return out.view(m.shape).to(m.dtype)


def _surely(condition: Tensor) -> bool:
    """Whether a condition is known to hold; the compiler traces without values and knows nothing."""
    return not torch.compiler.is_compiling() and bool(condition)


def _may_be_zero(gates: Tensor) -> bool:
    return not _surely((gates != 0).all())


def _live_rows(gates: Tensor, owner: Tensor) -> Tensor:
    """Packed rows [R] whose expert has a non-zero gate somewhere."""
    return (gates != 0).any(0).index_select(0, owner)


def _mask_dead(packed: Tensor, gates: Tensor, owner: Tensor, zeros: bool) -> Tensor:
    """Zero the rows of experts that no token uses, whose NaN would pass a product with zero.

    A row of a shared A is used where one of its branches is.
    """
    if not zeros or not len(packed) or _surely((live := _live_rows(gates, owner)).all()):
        return packed
    return packed.where(live.view(-1, len(packed)).any(0).unsqueeze(1), 0)


def _busy_tokens(w: Tensor, tokens: int, segments: Tensor | None) -> Tensor | None:
    """Mask [T, 1] of the tokens for which some of the row gates w [S, r] is not zero; None if all."""
    busy = (w != 0).any(1)
    busy = busy.index_select(0, segments) if segments is not None else busy
    if busy.shape[0] != tokens:
        busy = busy.repeat_interleave(tokens // busy.shape[0])
    return None if _surely(busy.all()) else busy.unsqueeze(1)


def _gram(p: Tensor, q: Tensor, busy: Tensor | None) -> Tensor:
    """p^T q over the busy tokens: [r, D]."""
    return p.t() @ (q if busy is None else q.where(busy, 0))


def _input_gradient(dy: Tensor, dz: Tensor, weight: Tensor, a: Tensor, keep: Tensor | None) -> Tensor:
    dx = dy @ weight
    if keep is None:
        return dx.addmm_(dz, a.to(dy.dtype))
    return dx.addcmul_(dz @ a.to(dy.dtype), keep)


def _gate_gradient(
    z: Tensor, v: Tensor, gates: Tensor, segments: Tensor | None, owner: Tensor, scale: float
) -> Tensor:
    """Return dg [S, E] = scale * the sum of Z o V over each segment's tokens and each expert's rows."""
    product = z.to(torch.promote_types(z.dtype, gates.dtype)) * v
    segment_count = gates.shape[0]
    if segments is not None:
        product = _summed(product, segments, segment_count)
    elif segment_count not in (0, z.shape[0]):
        product = product.reshape(segment_count, z.shape[0] // segment_count, z.shape[1]).sum(1)
    dgates = _summed(product.t(), owner, gates.shape[1]).t() * scale
    # An unused expert may hold NaN, which its gate's gradient must not carry into a softmax over all gates.
    return torch.where(gates == 0, dgates.nan_to_num(), dgates).to(gates.dtype)


def _summed(values: Tensor, index: Tensor, count: int) -> Tensor:
    """Sum the rows of values [n, D] that share an index: [count, D], the same bits in each run.

    On CUDA, index_add sums in the order of chance; index_put sorts first. Neither writes in place, which vmap
    refuses where the values alone are a batch.
    """
    sums = values.new_zeros(count, values.shape[1])
    if values.is_cuda:
        return sums.index_put((index,), values, accumulate=True)
    return sums.index_add(0, index, values)
