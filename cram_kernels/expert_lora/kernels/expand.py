"""EXPAND: Y_p += sum over q of U_q F_q, in place; U is gated already.

Forward: F = Bt, one Y for each of up to three stacked projections, all in one launch. Backward: one Y = dX,
to which every projection that read the same X adds its U = dZ times F = A; the dropout mask acts on the sum.

A program owns BLOCK_T x BLOCK_D of one Y. Rows of F at which U is 0 for all of the block's tokens count as
zeros, so NaN in an expert that a block does not use stays out of it (one that it uses reaches all its rows).
U may lie in several float32 planes (a split SHRINK), which are added in order.

ADDS: Y holds the base product, which this pass adds to. Otherwise Y is written, with the bias, and the base
product is added behind (`tiles.ORDER`).

WAIT: the kernel in front is the SHRINK that writes U, and this one starts before it has ended; everything but
U was written by kernels before that one. The wait must not stand in a loop: Triton 3.6 and 3.7 move loads of
a pipelined loop in front of it. Where one step covers every rank, F is loaded before the wait, in two parts:
80 packed rows are 64 and 16, not 128.

GATED: the planes are Z, and the gates are applied here, because the kernel in front writes those too.

Bytes: 2 T D_out + R D_out + T R elements, T D_out less where Y is not read.  FLOPs: 2 T R D_out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from cram_kernels.expert_lora.kernels.dropout import kept
from cram_kernels.expert_lora.kernels.gating import (
    FREE,
    Gating,
    block_of,
    decoded,
    encoded,
    gated,
    row_gates,
    stacked,
    used,
)
from cram_kernels.expert_lora.tiles import ExpandTile
from cram_kernels.launch import Launch, cdiv, nbytes, power_of_two

# WAIT, and how the packed rows are walked: in a loop without waiting, or waiting in front of it; at once, F
# loaded before U, waiting between the two or not.
NEVER, FIRST, BEHIND_F, AT_ONCE = (tl.constexpr(way) for way in range(4))
# Packed rows of one product where they are walked at once: more take the registers of the planes.
MOST_AT_ONCE = tl.constexpr(64)


class Strides(NamedTuple):
    """Kernel argument: elements between rows, planes and projections of U, bytes between rows of the mask."""

    row: Any
    plane: Any
    stack: Any
    bits: Any


@triton.jit
def output_of(block, widths, BLOCK_D: tl.constexpr):
    """Return which of up to three results a block of columns belongs to, and its place there."""
    OUTS: tl.constexpr = len(widths)
    out = 0
    if OUTS > 1:
        tiles = tl.cdiv(widths[0], BLOCK_D)
        out = (block >= tiles).to(tl.int32)
        block -= out * tiles
    if OUTS > 2:
        tiles = tl.where(out == 0, block + 1, tl.cdiv(widths[1], BLOCK_D))
        beyond = (block >= tiles).to(tl.int32)
        block -= beyond * tiles
        out += beyond
    return out, block


@triton.jit
def _rows_of(factor, columns, wanted, d, known, width):
    """Return rows `columns` of F at columns d, zeros where they are not wanted."""
    places = factor + columns.to(tl.int64)[:, None] * width + d[None, :]
    return tl.load(places, mask=wanted[:, None] & known[None, :], other=0.0)


@triton.jit
def _summed(u, given, rows, valid, columns, rank, strides, dtype, PLANES: tl.constexpr, GATED: tl.constexpr):
    """Return U at rows and columns: the planes added in order, and gated where they are not gated yet."""
    stored = valid[:, None] & (columns < strides.row)[None, :]
    places = u + rows.to(tl.int64)[:, None] * strides.row + columns[None, :]
    total = tl.load(places, mask=stored, other=0.0)
    for plane in tl.static_range(1, PLANES):
        total += tl.load(places + plane * tl.cast(strides.plane, tl.int64), mask=stored, other=0.0)
    if GATED:
        gates, segments, owner, samples, experts, per_gate, scale = given
        inside = columns < rank
        w = row_gates(gates, segments, owner, samples, experts, per_gate, scale, rows, valid, columns, inside)
        total = gated(total, w)
    return total.to(dtype)


@triton.jit
def _times(acc, left, tile):
    """Return acc + U F of a step whose F was loaded before U was known."""
    tile = tl.where(used(left, 0)[:, None], tile, 0.0)
    return tl.dot(left, tile.to(left.dtype), acc, input_precision="ieee")


@triton.jit
def add_product(
    acc,
    u,
    factor,
    given,
    rows,
    valid,
    d,
    known,
    rank,
    width,
    strides,
    dtype,
    PLANES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WAIT: tl.constexpr,
    GATED: tl.constexpr,
):
    """Return acc + U F of one projection; `given` is what gates are found by, for GATED."""
    if WAIT >= BEHIND_F:
        # BLOCK_R covers every rank, in two powers of two. What SHRINK does not write is loaded while it runs.
        MAIN: tl.constexpr = BLOCK_R if BLOCK_R < MOST_AT_ONCE else MOST_AT_ONCE
        REST: tl.constexpr = BLOCK_R - MAIN
        first = tl.arange(0, MAIN)
        tile = _rows_of(factor, first, first < rank, d, known, width)
        if REST > 0:
            rest = MAIN + tl.arange(0, REST)
            last = _rows_of(factor, rest, rest < rank, d, known, width)
        if WAIT == BEHIND_F:
            gdc_wait()
        left = _summed(u, given, rows, valid, first, rank, strides, dtype, PLANES, GATED)
        acc = _times(acc, left, tile)
        if REST > 0:
            left = _summed(u, given, rows, valid, rest, rank, strides, dtype, PLANES, GATED)
            acc = _times(acc, left, last)
    else:
        for start in range(0, strides.row, BLOCK_R):
            columns = start + tl.arange(0, BLOCK_R)
            left = _summed(u, given, rows, valid, columns, rank, strides, dtype, PLANES, GATED)
            tile = _rows_of(factor, columns, used(left, 0) & (columns < rank), d, known, width)
            acc = tl.dot(left, tile.to(dtype), acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=FREE)
def _expand(
    u,  # [PLANES, STACK, T, strides.row], planes and projections of any stride; gated, or Z where GATED
    factors,  # one [r_p, width] a projection
    ys,  # one [T, width_p] a projection, or one [T, width] for all
    biases,  # one [width_p] a Y or None; with ADDS none
    bits,  # the dropout mask on what is added, uint8 [T, strides.bits], or None
    gates,  # float32 [S, E]
    segments,  # integers [T], the row of gates of each token, or None
    owners,  # one [r_p] a projection: the expert of each packed row
    samples,
    experts,
    per_gate,
    scale,
    tokens,
    widths,
    ranks,  # encoded
    strides,
    PLANES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    ADDS: tl.constexpr,
    WAIT: tl.constexpr,
    GATED: tl.constexpr,
):
    OUTS: tl.constexpr = len(ys)
    if WAIT == FIRST:
        gdc_wait()
    out, block = output_of(tl.program_id(0), widths, BLOCK_D)
    y, width = stacked(ys, out), stacked(widths, out)
    rows = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    valid, known = rows < tokens, (d < width) | EVEN_D
    wanted = valid[:, None] & known[None, :]
    y_tile = y + rows.to(tl.int64)[:, None] * width + d[None, :]
    dtype: tl.constexpr = ys[0].dtype.element_ty
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for place in tl.static_range(1 if OUTS > 1 else len(factors)):
        p = out if OUTS > 1 else place
        acc = add_product(
            acc,
            u + p * tl.cast(strides.stack, tl.int64),
            stacked(factors, p),
            (gates, segments, stacked(owners, p), samples, experts, per_gate, scale),
            rows,
            valid,
            d,
            known,
            decoded(stacked(ranks, p)),
            width,
            strides,
            dtype,
            PLANES,
            BLOCK_R,
            WAIT,
            GATED,
        )
    if bits is not None:
        acc = tl.where(kept(bits, rows, valid, block * BLOCK_D, strides.bits, BLOCK_D), acc, 0.0)
    if ADDS:
        acc += tl.load(y_tile, mask=wanted, other=0.0).to(tl.float32)
    if biases is not None:
        bias = tl.load(stacked(biases, out) + d, mask=known, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    tl.store(y_tile, acc.to(dtype), mask=wanted)


def expand(
    u: Tensor,
    factors: Sequence[Tensor],
    ys: Sequence[Tensor],
    gating: Gating,
    tile: ExpandTile,
    *,
    bits: Tensor | None = None,
    biases: Sequence[Tensor] | None = None,
    adds: bool = True,
    direct: bool = False,
    dependent: bool = False,
    gated: bool = False,
) -> Launch:
    """Describe Y_p += U_p F_p for every projection, or Y += sum over p of U_p F_p.

    Args:
        u: [planes, STACK, T, pitch], the planes and projections of any stride; columns beyond a rank are 0.
        factors: One [r_p, D_p] a projection, contiguous, of one dtype: y's or float32.
        ys: One [T, D_p] a projection, or one [T, D] for all; contiguous; added to in place.
        gating: Gates and one owner a projection; read if `gated`.
        tile: Block sizes.
        bits: Dropout mask on what is added, see `dropout_bits`; None for none.
        biases: One [D_p] for each of `ys`, added where `adds` is False; None for none.
        adds: Add to `ys`; otherwise write them.
        direct: `u` is what the SHRINK in front writes for few tokens: F is loaded before it.
        dependent: Start before that SHRINK has ended.
        gated: `u` is not gated yet, and that SHRINK writes the gates too.
    """
    tokens, widths = ys[0].shape[0], tuple(y.shape[1] for y in ys)
    planes, _, _, pitch = u.shape
    block_r, wait = walk(pitch, tile, direct=direct, dependent=dependent)
    late = ("u", "gates") if gated else ("u",)
    return Launch(
        kernel=_expand,
        grid=(sum(cdiv(width, tile.block_d) for width in widths), cdiv(tokens, tile.block_t)),
        arguments=_arguments(u, factors, ys, biases, bits, gating),
        constants={
            "PLANES": planes,
            "BLOCK_T": tile.block_t,
            "BLOCK_R": block_r,
            "BLOCK_D": tile.block_d,
            "EVEN_D": all(width % tile.block_d == 0 for width in widths),
            "ADDS": adds,
            "WAIT": wait,
            "GATED": gated,
        },
        warps=tile.warps,
        stages=tile.stages,
        late=late if dependent else (),
        cost=lambda: (
            nbytes(u, *factors, *ys, *(ys if adds else ()), bits),
            2 * tokens * sum(f.numel() for f in factors),
        ),
        steps=cdiv(pitch, block_r),
    )


def walk(pitch: int, tile: ExpandTile, *, direct: bool, dependent: bool) -> tuple[int, int]:
    """Return BLOCK_R and WAIT of a launch over `pitch` packed rows; arguments as in `expand`."""
    if direct and pitch <= tile.block_r:
        full, rest = divmod(pitch, MOST_AT_ONCE.value)
        block_r = full * MOST_AT_ONCE.value + (power_of_two(rest) if rest else 0)
        return block_r, (BEHIND_F if dependent else AT_ONCE).value
    return block_of(pitch, most=tile.block_r), (FIRST if dependent else NEVER).value


def _arguments(
    u: Tensor,
    factors: Sequence[Tensor],
    ys: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    bits: Tensor | None,
    gating: Gating,
) -> dict[str, Any]:
    """Return the runtime arguments of `_expand`."""
    plane, stack, _, _ = u.stride()
    return {
        "u": u,
        "factors": tuple(factors),
        "ys": tuple(ys),
        "biases": None if biases is None else tuple(biases),
        "bits": bits,
        **gating.arguments(ys[0].shape[0]),
        "tokens": ys[0].shape[0],
        "widths": tuple(y.shape[1] for y in ys),
        "ranks": encoded([factor.shape[0] for factor in factors]),
        "strides": Strides(u.shape[3], plane, stack, 0 if bits is None else bits.shape[1]),
    }
