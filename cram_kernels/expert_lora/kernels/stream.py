"""STREAM and JOIN: a decode step's base products and experts in two launches, without the library's product.

STREAM: Y_p = X W_p^T and U_p = (X A_p^T) o w_p, both as float32 planes of a split K, for up to three stacked
projections. W and A are the same to it: rows that are read once and multiplied with the same few tokens.
JOIN: Y_p = sum of Y_p's planes + bias_p + U_p Bt_p, each element rounded once. It starts before STREAM has
ended (sm_90); Bt is loaded before the wait where one step covers every rank.

A program of STREAM takes BLOCK_R rows of one W, or of one A, over one of SPLIT_K ranges of K. Programs of A
follow those of W along the first axis and are as long as those.

Bytes: T D_in + D_out D_in + R (D_in + D_out) + T D_out elements, and SPLIT_K T (D_out + R) floats written and
read.  FLOPs: 2 T (D_out D_in + R (D_in + D_out)).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from cram_kernels.expert_lora.kernels.expand import FIRST, add_product, output_of, walk
from cram_kernels.expert_lora.kernels.expand import Strides as PlaneStrides
from cram_kernels.expert_lora.kernels.gating import (
    FREE,
    Gating,
    block_gates,
    decoded,
    encoded,
    gated,
    stacked,
)
from cram_kernels.expert_lora.kernels.shrink import shrink_block, store_block
from cram_kernels.expert_lora.tiles import ExpandTile, ShrinkTile
from cram_kernels.launch import Launch, cdiv, nbytes


class Strides(NamedTuple):
    """Kernel argument: elements between rows of X, of Y's planes and of U's planes."""

    x: Any
    y: Any
    u: Any


@triton.jit(do_not_specialize=FREE)
def _stream(
    x,  # [T, width], rows strides.x elements apart
    weights,  # one [widths[p], width] a projection
    factors,  # one [r_p, width] a projection
    y,  # float32 [SPLIT_K, STACK, T, strides.y], written
    u,  # float32 [SPLIT_K, STACK, T, strides.u], written
    gates,  # float32 [S, E]
    segments,  # integers [T], the row of gates of each token, or None
    owners,  # one [r_p] a projection: the expert of each packed row
    samples,
    experts,
    per_gate,
    scale,
    tokens,
    width,
    widths,
    strides,
    ranks,  # encoded
    SPLIT_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    DEPENDENTS: tl.constexpr,
):
    if DEPENDENTS:
        gdc_launch_dependents()
    STACK: tl.constexpr = len(weights)
    rows = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    tiles = tl.cdiv(widths[0], BLOCK_R)
    for p in tl.static_range(1, STACK):
        tiles += tl.cdiv(widths[p], BLOCK_R)
    block = tl.program_id(0)
    if block < tiles:
        projection, block = output_of(block, widths, BLOCK_R)
        columns = block * BLOCK_R + tl.arange(0, BLOCK_R)
        acc = shrink_block(
            x,
            stacked(weights, projection),
            None,
            tokens,
            width,
            strides.x,
            0,
            stacked(widths, projection),
            rows,
            columns,
            SPLIT_K,
            BLOCK_T,
            BLOCK_R,
            BLOCK_K,
            EVEN_K,
        )
        store_block(y, acc, tl.program_id(2) * STACK + projection, tokens, strides.y, rows, columns)
    else:
        each = tl.cdiv(strides.u, BLOCK_R)
        projection = (block - tiles) // each
        columns = (block - tiles) % each * BLOCK_R + tl.arange(0, BLOCK_R)
        rank = decoded(stacked(ranks, projection))
        given = gates, segments, owners, samples, experts, per_gate, scale
        w = block_gates(given, tokens, ranks, projection, rows, columns)
        acc = shrink_block(
            x,
            stacked(factors, projection),
            None,
            tokens,
            width,
            strides.x,
            0,
            rank,
            rows,
            columns,
            SPLIT_K,
            BLOCK_T,
            BLOCK_R,
            BLOCK_K,
            EVEN_K,
        )
        plane = tl.program_id(2) * STACK + projection
        store_block(u, gated(acc, w), plane, tokens, strides.u, rows, columns)


@triton.jit(do_not_specialize=["tokens"])
def _join(
    u,  # float32 [PLANES, STACK, T, u_strides.row]
    y,  # float32 [PLANES, STACK, T, y_strides.row]
    factors,  # one [r_p, widths[p]] a projection
    outs,  # one [T, widths[p]] a projection, written
    biases,  # one [widths[p]] a projection, or None
    tokens,
    widths,
    ranks,  # encoded
    u_strides,
    y_strides,
    PLANES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    WAIT: tl.constexpr,
):
    if WAIT == FIRST:
        gdc_wait()
    p, block = output_of(tl.program_id(0), widths, BLOCK_D)
    width = stacked(widths, p)
    rows = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    valid, known = rows < tokens, (d < width) | EVEN_D
    wanted = valid[:, None] & known[None, :]
    dtype: tl.constexpr = outs[0].dtype.element_ty
    acc = add_product(
        tl.zeros((BLOCK_T, BLOCK_D), tl.float32),
        u + p * tl.cast(u_strides.stack, tl.int64),
        stacked(factors, p),
        None,
        rows,
        valid,
        d,
        known,
        decoded(stacked(ranks, p)),
        width,
        u_strides,
        dtype,
        PLANES,
        BLOCK_R,
        WAIT,
        False,
    )
    places = y + p * tl.cast(y_strides.stack, tl.int64)
    places += rows.to(tl.int64)[:, None] * y_strides.row + d[None, :]
    for plane in tl.static_range(PLANES):
        acc += tl.load(places + plane * tl.cast(y_strides.plane, tl.int64), mask=wanted, other=0.0)
    if biases is not None:
        acc += tl.load(stacked(biases, p) + d, mask=known, other=0.0).to(tl.float32)[None, :]
    out = stacked(outs, p) + rows.to(tl.int64)[:, None] * width + d[None, :]
    tl.store(out, acc.to(dtype), mask=wanted)


def stream(
    x: Tensor,
    weights: Sequence[Tensor],
    factors: Sequence[Tensor],
    y: Tensor,
    u: Tensor,
    gating: Gating,
    tile: ShrinkTile,
    *,
    dependents: bool = False,
) -> Launch:
    """Describe the planes of Y_p = X W_p^T and of U_p = (X A_p^T) o w_p.

    Args:
        x: [T, D_in], rows of any stride, elements of a row adjacent.
        weights: One [D_out_p, D_in] a projection (at most three), contiguous, of x's dtype.
        factors: One [r_p, D_in] a projection, contiguous, of one dtype: x's or float32.
        y: float32 [SPLIT_K, STACK, T, the largest D_out_p], contiguous; written.
        u: float32 [SPLIT_K, STACK, T, pitch], contiguous; written.
        gating: Gates and one owner a projection.
        tile: Block sizes; `block_r` rows of W or of A a program.
        dependents: Let the kernel behind this one start early.
    """
    tokens, width = x.shape
    split_k, stack, _, pitch = u.shape
    widths = tuple(weight.shape[0] for weight in weights)
    tiles = sum(cdiv(each, tile.block_r) for each in widths) + stack * cdiv(pitch, tile.block_r)
    return Launch(
        kernel=_stream,
        grid=(tiles, cdiv(tokens, tile.block_t), split_k),
        arguments={
            "x": x,
            "weights": tuple(weights),
            "factors": tuple(factors),
            "y": y,
            "u": u,
            **gating.arguments(tokens),
            "tokens": tokens,
            "width": width,
            "widths": widths,
            "strides": Strides(x.stride(0), y.shape[3], pitch),
            "ranks": encoded([factor.shape[0] for factor in factors]),
        },
        constants={
            "SPLIT_K": split_k,
            "BLOCK_T": tile.block_t,
            "BLOCK_R": tile.block_r,
            "BLOCK_K": tile.block_k,
            "EVEN_K": width % tile.block_k == 0,
            "DEPENDENTS": dependents,
        },
        warps=tile.warps,
        stages=tile.stages,
        cost=lambda: (
            nbytes(x, *weights, *factors, y, u),
            2 * tokens * width * sum(each.shape[0] for each in (*weights, *factors)),
        ),
        steps=cdiv(cdiv(width, tile.block_k), split_k),
    )


def join(
    u: Tensor,
    y: Tensor,
    factors: Sequence[Tensor],
    outs: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    tile: ExpandTile,
    *,
    dependent: bool = False,
) -> Launch:
    """Describe Y_p = sum of Y_p's planes + bias_p + U_p Bt_p.

    Args:
        u, y: What `stream` writes.
        factors: One [r_p, D_out_p] a projection, contiguous, of one dtype: the results' or float32.
        outs: One [T, D_out_p] a projection, contiguous; written.
        biases: One [D_out_p] a projection; None for none.
        tile: Block sizes.
        dependent: Start before the STREAM in front has ended.
    """
    tokens, widths = outs[0].shape[0], tuple(out.shape[1] for out in outs)
    planes, _, _, pitch = u.shape
    block_r, wait = walk(pitch, tile, direct=True, dependent=dependent)
    return Launch(
        kernel=_join,
        grid=(sum(cdiv(width, tile.block_d) for width in widths), cdiv(tokens, tile.block_t)),
        arguments={
            "u": u,
            "y": y,
            "factors": tuple(factors),
            "outs": tuple(outs),
            "biases": None if biases is None else tuple(biases),
            "tokens": tokens,
            "widths": widths,
            "ranks": encoded([factor.shape[0] for factor in factors]),
            "u_strides": _strides(u),
            "y_strides": _strides(y),
        },
        constants={
            "PLANES": planes,
            "BLOCK_T": tile.block_t,
            "BLOCK_R": block_r,
            "BLOCK_D": tile.block_d,
            "EVEN_D": all(width % tile.block_d == 0 for width in widths),
            "WAIT": wait,
        },
        warps=tile.warps,
        stages=tile.stages,
        late=("u", "y") if dependent else (),
        cost=lambda: (
            nbytes(u, y, *factors, *outs, *(biases or ())),
            2 * tokens * sum(factor.numel() for factor in factors),
        ),
        steps=cdiv(pitch, block_r),
    )


def _strides(planes: Tensor) -> PlaneStrides:
    plane, stack, row, _ = planes.stride()
    return PlaneStrides(row, plane, stack, 0)
