"""EXPAND: Y += sum_p (Z_p o w_p) F_p, in place, for up to three stacked projections; w is made on load.

The base linear has written Y; adding into it here is the only pass over Y beyond it. Forward: F = Bt, one
projection a launch (each has its own Y). Backward: F_p = A_p and Y = dX, all projections that read the same X
in one launch, and the dropout mask on the sum.

A program owns BLOCK_T x BLOCK_D of Y. Rows of F whose gates are 0 for all of the block's tokens are read as
zeros, so NaN in an expert that a block does not use stays out of it (one that it uses reaches all its rows).
Z may lie in several float32 planes (a split SHRINK), which are added in order; what SHRINK skipped is read
and dropped by selection.

DEPENDENT: the kernel in front is the SHRINK that writes Z, and this one starts before it has ended;
everything but Z was written by kernels before that one. LATE_GATES: it writes the gates too.

Bytes: 2 T D_out + R D_out + T R elements.  FLOPs: 2 T R D_out.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from cram_kernels.expert_lora.kernels.gating import (
    Dropout,
    Gating,
    block_of,
    gate_row,
    gated,
    kept,
    row_gates,
    tokens_per_gate,
)
from cram_kernels.expert_lora.tiles import ExpandTile
from cram_kernels.launch import Launch, cdiv, nbytes


@triton.jit(do_not_specialize=["tokens", "per_gate", "dropout"])
def _expand(
    z,
    factors,
    y,
    gating,
    dropout,
    tokens,
    per_gate,
    width,
    ranks,
    pitch,
    plane_stride,
    stack_stride,
    STACK: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    DROPOUT: tl.constexpr,
    MAPPED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    LATE_GATES: tl.constexpr,
):
    rows = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    valid = rows < tokens
    wanted = valid[:, None] & ((d < width)[None, :] | EVEN_D)
    y_tile = y + rows.to(tl.int64)[:, None] * width + d[None, :]
    gate_rows = gate_row(gating, rows, valid, per_gate, MAPPED)
    if LATE_GATES:
        gdc_wait()
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for p in tl.static_range(STACK):
        for first in range(0, ranks[p], BLOCK_R):
            columns = first + tl.arange(0, BLOCK_R)
            inside, stored = columns < ranks[p], columns < pitch
            w = row_gates(
                gating, gating.owner[p], gate_rows[:, None], valid[:, None], columns[None, :], inside[None, :]
            )
            live = tl.max((w != 0.0).to(tl.int32), 0) > 0
            factor_rows = factors[p] + columns.to(tl.int64)[:, None] * width
            factor = tl.load(
                factor_rows + d[None, :], mask=live[:, None] & ((d < width)[None, :] | EVEN_D), other=0.0
            )
            if DEPENDENT:
                gdc_wait()
            sum_z = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
            for plane in tl.static_range(PLANES):
                z_rows = z + plane * tl.cast(plane_stride, tl.int64) + p * tl.cast(stack_stride, tl.int64)
                z_rows += rows.to(tl.int64)[:, None] * pitch
                # What lies beyond the rank, and what SHRINK skipped, is never used: its gate is 0.
                sum_z += tl.load(z_rows + columns[None, :], mask=valid[:, None] & stored[None, :], other=0.0)
            # The plane sums are Z in float32; like a stored Z they round to y's dtype before the gate.
            u = gated(sum_z.to(y.dtype.element_ty), w).to(y.dtype.element_ty)
            acc = tl.dot(u, factor.to(y.dtype.element_ty), acc, input_precision="ieee")
    if DROPOUT:
        acc = tl.where(kept(dropout, rows, d), acc, 0.0)
    before = tl.load(y_tile, mask=wanted, other=0.0)
    tl.store(y_tile, (before.to(tl.float32) + acc).to(y.dtype.element_ty), mask=wanted)


def expand(
    z: Tensor,
    factors: tuple[Tensor, ...],
    y: Tensor,
    gating: Gating,
    dropout: Dropout,
    tile: ExpandTile,
    *,
    dependent: bool = False,
    late_gates: bool = False,
) -> Launch:
    """Describe Y += sum_p (Z_p o w_p) F_p.

    Args:
        z: [planes, STACK, T, pitch], the planes and projections of any stride; filled by SHRINK.
        factors: One [r_p, D] a projection, contiguous; y's dtype or float32.
        y: [T, D], contiguous; added to in place.
        gating: Gates and one owner a projection.
        dropout: Mask on what is added; zeros for none.
        tile: Block sizes.
        dependent: Start before the SHRINK in front has ended.
        late_gates: That SHRINK writes the gates too.
    """
    tokens, width = y.shape
    ranks = tuple(factor.shape[0] for factor in factors)
    return Launch(
        kernel=_expand,
        grid=(cdiv(width, tile.block_d), cdiv(tokens, tile.block_t)),
        arguments={
            "z": z,
            "factors": factors,
            "y": y,
            "gating": gating,
            "dropout": dropout,
            "tokens": tokens,
            "per_gate": tokens_per_gate(tokens, gating.gates),
            "width": width,
            "ranks": ranks,
            "pitch": z.shape[-1],
            "plane_stride": z.stride(0),
            "stack_stride": z.stride(1),
        },
        constants={
            "STACK": len(factors),
            "PLANES": z.shape[0],
            "BLOCK_T": tile.block_t,
            "BLOCK_R": block_of(z.shape[-1], most=tile.block_r),
            "BLOCK_D": tile.block_d,
            "EVEN_D": width % tile.block_d == 0,
            "DROPOUT": dropout.dropped > 0,
            "MAPPED": gating.segments is not None,
            "DEPENDENT": dependent,
            "LATE_GATES": dependent and late_gates,
        },
        warps=tile.warps,
        stages=tile.stages,
        moved_bytes=nbytes(z, *factors, y, y),
        flops=2 * tokens * sum(ranks) * width,
        dependent=dependent,
    )
