"""SHRINK: Z[p] = drop(X) A_p^T for up to three stacked projections that read the same X, ranks packed.

One program makes BLOCK_T x BLOCK_R of one projection's Z from one of SPLIT_K ranges of the K axis. Programs
that read the same rows of X are neighbours in the grid, so that X comes from device memory once whatever the
number of rank tiles and projections. With SPLIT_K > 1 the partial sums go to float32 planes, which the reader
adds in order: no atomics, and the split depends on the size bucket only, so a row's result does not depend on
the rows beside it.

SKIP leaves out rank tiles whose gates are all exactly 0 in a row block (experts of other groups); their Z
stays unwritten, and no reader uses it.

Bytes: T D_in + R D_in + T R elements.  FLOPs: 2 T R D_in.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from cram_kernels.expert_lora.kernels.gating import (
    Dropout,
    Gating,
    block_of,
    gate_row,
    kept,
    row_gates,
    stacked,
    tokens_per_gate,
)
from cram_kernels.expert_lora.tiles import ShrinkTile
from cram_kernels.launch import Launch, cdiv, nbytes


@triton.jit
def shrink_block(
    x,
    factor,
    z,
    dropout,
    tokens,
    width,
    x_stride,
    pitch,
    plane,
    rank,
    rows,
    columns,
    SPLIT_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """Write one block of one plane of Z: the sum over the K range of the program's split."""
    split = tl.program_id(2)
    valid, inside = rows < tokens, columns < rank
    x_rows = x + rows.to(tl.int64)[:, None] * x_stride
    factor_rows = factor + columns.to(tl.int64)[:, None] * width
    acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    span = tl.cdiv(tl.cdiv(width, BLOCK_K), SPLIT_K) * BLOCK_K
    for start in range(split * span, tl.minimum((split + 1) * span, width), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if EVEN_K:
            x_tile = tl.load(x_rows + k[None, :], mask=valid[:, None], other=0.0)
            factor_tile = tl.load(factor_rows + k[None, :], mask=inside[:, None], other=0.0)
        else:
            x_tile = tl.load(x_rows + k[None, :], mask=valid[:, None] & (k < width)[None, :], other=0.0)
            factor_tile = tl.load(
                factor_rows + k[None, :], mask=inside[:, None] & (k < width)[None, :], other=0.0
            )
        if DROPOUT:
            x_tile = tl.where(kept(dropout, rows, k), x_tile, 0.0)
        factor_tile = tl.trans(factor_tile.to(x_tile.dtype))
        acc = tl.dot(x_tile, factor_tile, acc, input_precision="ieee")
    z_rows = z + (plane.to(tl.int64) * tokens + rows)[:, None] * pitch
    tl.store(
        z_rows + columns[None, :],
        acc.to(z.dtype.element_ty),
        mask=valid[:, None] & (columns < pitch)[None, :],
    )


@triton.jit(do_not_specialize=["tokens", "per_gate", "dropout"])
def _shrink(
    x,
    factors,
    z,
    gating,
    dropout,
    tokens,
    per_gate,
    width,
    x_stride,
    ranks,
    pitch,
    STACK: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    DROPOUT: tl.constexpr,
    SKIP: tl.constexpr,
    MAPPED: tl.constexpr,
    DEPENDENTS: tl.constexpr,
):
    if DEPENDENTS:
        gdc_launch_dependents()
    tiles = tl.cdiv(pitch, BLOCK_R)
    projection = tl.program_id(0) // tiles
    columns = tl.program_id(0) % tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    rows = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    rank = stacked(ranks, projection, STACK)
    if SKIP:
        valid, inside = rows < tokens, columns < rank
        owner = stacked(gating.owner, projection, STACK)
        gate_rows = gate_row(gating, rows, valid, per_gate, MAPPED)
        w = row_gates(gating, owner, gate_rows[:, None], valid[:, None], columns[None, :], inside[None, :])
        if tl.max(tl.max((w != 0.0).to(tl.int32), 1), 0) == 0:
            return
    shrink_block(
        x,
        stacked(factors, projection, STACK),
        z,
        dropout,
        tokens,
        width,
        x_stride,
        pitch,
        tl.program_id(2) * STACK + projection,
        rank,
        rows,
        columns,
        SPLIT_K,
        BLOCK_T,
        BLOCK_R,
        BLOCK_K,
        EVEN_K,
        DROPOUT,
    )


def shrink(
    x: Tensor,
    factors: tuple[Tensor, ...],
    z: Tensor,
    gating: Gating,
    dropout: Dropout,
    tile: ShrinkTile,
    *,
    skip: bool = False,
    dependents: bool = False,
) -> Launch:
    """Describe Z = drop(X) A^T.

    Args:
        x: [T, D_in], rows of any stride, elements of a row adjacent.
        factors: One [r_p, D_in] a projection (at most three), contiguous; x's dtype or float32.
        z: [SPLIT_K, STACK, T, pitch], contiguous; pitch is a multiple of 16 and covers every rank.
        gating: Read by `skip` only.
        dropout: Mask on x; zeros for none.
        tile: Block sizes.
        skip: Leave out rank tiles without a live gate.
        dependents: Let the kernel behind this one start early.
    """
    tokens, width = x.shape
    ranks = tuple(factor.shape[0] for factor in factors)
    split_k, _, _, pitch = z.shape
    block_r = block_of(pitch, most=tile.block_r)
    return Launch(
        kernel=_shrink,
        grid=(len(factors) * cdiv(pitch, block_r), cdiv(tokens, tile.block_t), split_k),
        arguments={
            "x": x,
            "factors": factors,
            "z": z,
            "gating": gating,
            "dropout": dropout,
            "tokens": tokens,
            "per_gate": tokens_per_gate(tokens, gating.gates),
            "width": width,
            "x_stride": x.stride(0),
            "ranks": ranks,
            "pitch": pitch,
        },
        constants={
            "STACK": len(factors),
            "SPLIT_K": split_k,
            "BLOCK_T": tile.block_t,
            "BLOCK_R": block_r,
            "BLOCK_K": tile.block_k,
            "EVEN_K": width % tile.block_k == 0,
            "DROPOUT": dropout.dropped > 0,
            "SKIP": skip,
            "MAPPED": gating.segments is not None,
            "DEPENDENTS": dependents,
        },
        warps=tile.warps,
        stages=tile.stages,
        moved_bytes=nbytes(x, *factors, z),
        flops=2 * tokens * sum(ranks) * width,
    )
