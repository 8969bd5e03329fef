"""GRAM: the weight gradients of the trained suffix, both in one launch, split over tokens, summed in order.

    dA = (V o w)^T drop(X)        dBt = (Z o w)^T dY

A program owns BLOCK_R x BLOCK_D of one gradient over one slab of tokens and writes a float32 plane;
`reduce_planes` adds the planes in order: no atomics. Tokens whose trained gates are all exactly 0 are read as
zeros, so NaN in their rows stays out.

Bytes: T (D_in + D_out) + 2 T r elements, planes apart.  FLOPs: 2 T r (D_in + D_out).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

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
from cram_kernels.expert_lora.tiles import GramTile
from cram_kernels.launch import Launch, cdiv, nbytes

REDUCE_BLOCK, REDUCE_WARPS = 1024, 4


@triton.jit
def _problem(items, index, PROBLEMS: tl.constexpr):
    """Return items[index] of a tuple of one or two."""
    item = items[0]
    if PROBLEMS > 1:  # noqa: SIM102 - a compile-time condition around a run-time one
        if index == 1:
            item = items[1]
    return item


@triton.jit(do_not_specialize=["tokens", "per_gate", "dropout", "first"])
def _gram(
    lefts,
    rights,
    planes,
    gating,
    dropout,
    tokens,
    per_gate,
    widths,
    strides,
    pitch,
    first,
    count,
    PROBLEMS: tl.constexpr,
    SPLIT_T: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DROPOUT: tl.constexpr,
    MAPPED: tl.constexpr,
):
    tiles = tl.cdiv(widths[0], BLOCK_D)
    problem = (tl.program_id(0) >= tiles).to(tl.int32)
    width = _problem(widths, problem, PROBLEMS)
    d = (tl.program_id(0) - problem * tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    trained = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    inside = trained < count
    columns = first + trained
    left = _problem(lefts, problem, PROBLEMS)
    right = _problem(rights, problem, PROBLEMS)
    # Each comes 32 or 64 bits wide, as its value needs.
    wide = (tl.cast(strides[0], tl.int64), tl.cast(strides[PROBLEMS - 1], tl.int64))
    stride = _problem(wide, problem, PROBLEMS)
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    slab = tl.cdiv(tl.cdiv(tokens, BLOCK_T), SPLIT_T) * BLOCK_T
    for start in range(split * slab, tl.minimum((split + 1) * slab, tokens), BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)
        valid = rows < tokens
        offsets = rows.to(tl.int64)
        gate_rows = gate_row(gating, rows, valid, per_gate, MAPPED)
        w = row_gates(
            gating, gating.owner[0], gate_rows[None, :], valid[None, :], columns[:, None], inside[:, None]
        )
        left_tile = left + offsets[None, :] * pitch + columns[:, None]
        loaded = tl.load(left_tile, mask=valid[None, :] & inside[:, None], other=0.0)
        right_tile = right + offsets[:, None] * stride + d[None, :]
        tile = tl.load(right_tile, mask=valid[:, None] & (d < width)[None, :], other=0.0)
        busy = tl.max((w != 0.0).to(tl.int32), 0) > 0
        tile = tl.where(busy[:, None], tile, 0.0)
        if DROPOUT:
            tile = tl.where((problem == 1) | kept(dropout, rows, d), tile, 0.0)
        u = gated(loaded, w).to(tile.dtype)
        acc = tl.dot(u, tile, acc, input_precision="ieee")
    total = widths[0] * count
    if PROBLEMS > 1:
        total += widths[1] * count
    plane = planes + split.to(tl.int64) * total + problem * widths[0] * count
    tl.store(plane + trained[:, None] * width + d[None, :], acc, mask=inside[:, None] & (d < width)[None, :])


@triton.jit
def _reduce_planes(
    planes, outs, first_count, count, OUTS: tl.constexpr, PLANES: tl.constexpr, BLOCK: tl.constexpr
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < count
    acc = tl.load(planes + offsets, mask=inside, other=0.0)
    for plane in tl.static_range(1, PLANES):
        acc += tl.load(planes + plane * tl.cast(count, tl.int64) + offsets, mask=inside, other=0.0)
    acc = acc.to(outs[0].dtype.element_ty)
    tl.store(outs[0] + offsets, acc, mask=offsets < first_count)
    if OUTS > 1:
        tl.store(outs[1] + (offsets - first_count), acc, mask=inside & (offsets >= first_count))


def gram(
    lefts: tuple[Tensor, ...],
    rights: tuple[Tensor, ...],
    planes: Tensor,
    gating: Gating,
    dropout: Dropout,
    first: int,
    tile: GramTile,
) -> Launch:
    """Describe the planes of (left o w)^T right for one problem or two.

    Args:
        lefts: V, Z or one of them: [T, pitch] each.
        rights: X, dY or one of them: [T, D] each, rows of any stride; dropout acts on the first.
        planes: float32 [SPLIT_T, r * sum of the widths]; gradients one after another, each [r, D].
        gating: Gates and one owner.
        dropout: Mask on the first of `rights`; zeros for none.
        first: First trained packed row; those from it to the end of the owner are trained.
        tile: Block sizes.
    """
    tokens = rights[0].shape[0]
    widths = tuple(right.shape[1] for right in rights)
    count = gating.owner[0].shape[0] - first
    block_r = block_of(count, most=tile.block_r)
    return Launch(
        kernel=_gram,
        grid=(
            sum(cdiv(w, tile.block_d) for w in widths),
            cdiv(count, block_r),
            planes.shape[0],
        ),
        arguments={
            "lefts": lefts,
            "rights": rights,
            "planes": planes,
            "gating": gating,
            "dropout": dropout,
            "tokens": tokens,
            "per_gate": tokens_per_gate(tokens, gating.gates),
            "widths": widths,
            "strides": tuple(right.stride(0) for right in rights),
            "pitch": lefts[0].shape[1],
            "first": first,
            "count": count,
        },
        constants={
            "PROBLEMS": len(rights),
            "SPLIT_T": planes.shape[0],
            "BLOCK_T": tile.block_t,
            "BLOCK_R": block_r,
            "BLOCK_D": tile.block_d,
            "DROPOUT": dropout.dropped > 0,
            "MAPPED": gating.segments is not None,
        },
        warps=tile.warps,
        stages=tile.stages,
        moved_bytes=nbytes(*rights, planes) + len(lefts) * tokens * count * lefts[0].element_size(),
        flops=2 * tokens * count * sum(widths),
    )


def reduce_planes(planes: Tensor, *outs: Tensor) -> Launch:
    """Describe the sum of the planes in order, cut into one result or two and cast to their dtype.

    Args:
        planes: float32 [PLANES, ...], contiguous.
        outs: Contiguous, of one dtype, together as many elements as one plane.
    """
    count = sum(out.numel() for out in outs)
    return Launch(
        kernel=_reduce_planes,
        grid=(cdiv(count, REDUCE_BLOCK),),
        arguments={"planes": planes, "outs": outs, "first_count": outs[0].numel(), "count": count},
        constants={"OUTS": len(outs), "PLANES": planes.shape[0], "BLOCK": REDUCE_BLOCK},
        warps=REDUCE_WARPS,
        stages=1,
        moved_bytes=nbytes(planes, *outs),
    )
