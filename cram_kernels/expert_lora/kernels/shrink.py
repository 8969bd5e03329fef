"""SHRINK: Z[p] = drop(X) A_p^T for up to three stacked projections that read the same X, ranks packed.

One program makes BLOCK_T x BLOCK_R of one projection's Z from one of SPLIT_K ranges of the K axis. Programs
that read the same rows of X are neighbours in the grid, so that X comes from device memory once whatever the
number of rank tiles and projections. With SPLIT_K > 1 the partial sums go to float32 planes, which the reader
adds in order: no atomics, and the split depends on the size bucket only, so a row's result does not depend on
the rows beside it.

GATED: what is written is U = Z o w, plane by plane, for an EXPAND that follows at once. SKIP leaves out rank
tiles whose gates are all exactly 0 in a row block (experts of other groups): U is 0 there; Z stays unwritten,
and FOLD selects it away.

Bytes: T D_in + R D_in + T R elements.  FLOPs: 2 T R D_in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from cram_kernels.expert_lora.kernels.dropout import kept
from cram_kernels.expert_lora.kernels.gating import (
    FREE,
    Gating,
    block_gates,
    block_of,
    decoded,
    encoded,
    gated,
    stacked,
)
from cram_kernels.expert_lora.tiles import ShrinkTile
from cram_kernels.launch import Launch, cdiv, nbytes


class Strides(NamedTuple):
    """Kernel argument: elements between rows of X and of Z, bytes between rows of the dropout mask."""

    x: Any
    z: Any
    bits: Any


@triton.jit
def shrink_block(
    x,
    factor,
    bits,
    tokens,
    width,
    x_stride,
    bits_pitch,
    rank,
    rows,
    columns,
    SPLIT_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Return one block of one plane of Z: the sum over the K range of the program's split."""
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
        if bits is not None:
            x_tile = tl.where(kept(bits, rows, valid, start, bits_pitch, BLOCK_K), x_tile, 0.0)
        factor_tile = tl.trans(factor_tile.to(x_tile.dtype))
        acc = tl.dot(x_tile, factor_tile, acc, input_precision="ieee")
    return acc


@triton.jit
def store_block(z, values, plane, tokens, pitch, rows, columns):
    """Write one block of one plane [T, pitch] of Z or U."""
    places = z + (plane.to(tl.int64) * tokens + rows)[:, None] * pitch + columns[None, :]
    tl.store(
        places, values.to(z.dtype.element_ty), mask=(rows < tokens)[:, None] & (columns < pitch)[None, :]
    )


@triton.jit(do_not_specialize=FREE)
def _shrink(
    x,  # [T, width], rows strides.x elements apart
    factors,  # one [r_p, width] a projection
    z,  # [SPLIT_K, STACK, T, strides.z], written: Z, or U where GATED
    bits,  # the dropout mask on x, uint8 [T, strides.bits], or None
    gates,  # float32 [S, E]
    segments,  # integers [T], the row of gates of each token, or None
    owners,  # one [r_p] a projection: the expert of each packed row
    samples,
    experts,
    per_gate,
    scale,
    tokens,
    width,
    strides,
    ranks,  # encoded
    SPLIT_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    SKIP: tl.constexpr,
    GATED: tl.constexpr,
    DEPENDENTS: tl.constexpr,
):
    if DEPENDENTS:
        gdc_launch_dependents()
    tiles = tl.cdiv(strides.z, BLOCK_R)
    projection = tl.program_id(0) // tiles
    columns = tl.program_id(0) % tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    rows = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    rank = decoded(stacked(ranks, projection))
    plane = tl.program_id(2) * len(factors) + projection
    if SKIP or GATED:
        given = gates, segments, owners, samples, experts, per_gate, scale
        w = block_gates(given, tokens, ranks, projection, rows, columns)
    if SKIP:  # noqa: SIM102 - a compile-time condition around a run-time one
        if tl.max(tl.max((w != 0.0).to(tl.int32), 1), 0) == 0:
            if GATED:
                nothing = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
                store_block(z, nothing, plane, tokens, strides.z, rows, columns)
            return
    acc = shrink_block(
        x,
        stacked(factors, projection),
        bits,
        tokens,
        width,
        strides.x,
        strides.bits,
        rank,
        rows,
        columns,
        SPLIT_K,
        BLOCK_T,
        BLOCK_R,
        BLOCK_K,
        EVEN_K,
    )
    if GATED:
        acc = gated(acc, w)
    store_block(z, acc, plane, tokens, strides.z, rows, columns)


def block_constants(z: Tensor, tile: ShrinkTile, width: int) -> dict[str, Any]:
    """Return the compile-time arguments of `shrink_block` for z [SPLIT_K, STACK, T, pitch] and rows of X."""
    return {
        "SPLIT_K": z.shape[0],
        "BLOCK_T": tile.block_t,
        "BLOCK_R": block_of(z.shape[3], most=tile.block_r),
        "BLOCK_K": tile.block_k,
        "EVEN_K": width % tile.block_k == 0,
    }


def shrink(
    x: Tensor,
    factors: Sequence[Tensor],
    z: Tensor,
    gating: Gating,
    tile: ShrinkTile,
    *,
    bits: Tensor | None = None,
    skip: bool = False,
    gated: bool = False,
    dependents: bool = False,
) -> Launch:
    """Describe Z = drop(X) A^T, or U = Z o w.

    Args:
        x: [T, D_in], rows of any stride, elements of a row adjacent.
        factors: One [r_p, D_in] a projection (at most three), contiguous, of one dtype: x's or float32.
        z: [SPLIT_K, STACK, T, pitch], contiguous; pitch is a multiple of 16 and covers every rank.
        gating: Gates and one owner a projection; read by `skip` and `gated` only.
        tile: Block sizes.
        bits: Dropout mask on x, see `dropout_bits`; None for none.
        skip: Leave out rank tiles without a live gate.
        gated: Write U.
        dependents: Let the kernel behind this one start early.
    """
    tokens, width = x.shape
    split_k, stack, _, pitch = z.shape
    block = block_constants(z, tile, width)
    return Launch(
        kernel=_shrink,
        grid=(stack * cdiv(pitch, block["BLOCK_R"]), cdiv(tokens, tile.block_t), split_k),
        arguments={
            "x": x,
            "factors": tuple(factors),
            "z": z,
            "bits": bits,
            **gating.arguments(tokens),
            "tokens": tokens,
            "width": width,
            "strides": Strides(x.stride(0), pitch, 0 if bits is None else bits.shape[1]),
            "ranks": encoded([factor.shape[0] for factor in factors]),
        },
        constants={
            **block,
            "SKIP": skip,
            "GATED": gated,
            "DEPENDENTS": dependents,
        },
        warps=tile.warps,
        stages=tile.stages,
        cost=lambda: (
            nbytes(x, *factors, z, bits),
            2 * tokens * width * sum(factor.shape[0] for factor in factors),
        ),
        steps=cdiv(cdiv(width, tile.block_k), split_k),
    )
