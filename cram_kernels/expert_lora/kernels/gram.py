"""GRAM: the weight gradients of the trained suffix, both in one launch, split over tokens, summed in order.

    dA = dZ^T drop(X)        dBt = U^T dY        dZ = V o w and U = Z o w, made by FOLD

A program owns BLOCK_R x BLOCK_D of one gradient over one slab of tokens and writes a float32 plane;
`reduce_planes` adds the planes in order: no atomics. Tokens at which the left factor is 0 in all of the
program's rows, as where their trained gates are 0, are read as zeros, so NaN in their rows stays out. Rows of
packed ranks start at a multiple of 16, in front of the first trained one, so that they load by 16 bytes.

Bytes: T (D_in + D_out) + 2 T r elements, planes apart.  FLOPs: 2 T r (D_in + D_out).
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from cram_kernels.expert_lora.kernels.dropout import kept
from cram_kernels.expert_lora.kernels.gating import block_of, used
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


@triton.jit(do_not_specialize=["tokens", "first", "count"])
def _gram(
    lefts,  # one or two [T, pitch]: dZ, U
    rights,  # one or two [T, width_i], rows strides[i] elements apart: X, dY
    planes,  # float32 [SPLIT_T, count * sum of the widths], written
    bits,  # the dropout mask on the first of `rights`, uint8 [T, bits_pitch], or None
    tokens,
    widths,
    strides,
    pitch,
    bits_pitch,
    first,
    count,
    PROBLEMS: tl.constexpr,
    SPLIT_T: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
):
    tiles = tl.cdiv(widths[0], BLOCK_D)
    problem = (tl.program_id(0) >= tiles).to(tl.int32)
    width = _problem(widths, problem, PROBLEMS)
    column = (tl.program_id(0) - problem * tiles) * BLOCK_D
    d = column + tl.arange(0, BLOCK_D)
    known = (d < width) | EVEN_D
    columns = first // 16 * 16 + tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    left = _problem(lefts, problem, PROBLEMS)
    right = _problem(rights, problem, PROBLEMS)
    # Each comes 32 or 64 bits wide, as its value needs.
    wide = (tl.cast(strides[0], tl.int64), tl.cast(strides[PROBLEMS - 1], tl.int64))
    stride = _problem(wide, problem, PROBLEMS)
    acc = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
    slab = tl.cdiv(tl.cdiv(tokens, BLOCK_T), SPLIT_T) * BLOCK_T
    for start in range(split * slab, tl.minimum((split + 1) * slab, tokens), BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)
        valid = rows < tokens
        offsets = rows.to(tl.int64)
        u_tile = left + offsets[:, None] * pitch + columns[None, :]
        u = tl.load(u_tile, mask=valid[:, None] & (columns < pitch)[None, :], other=0.0)
        # Frozen columns in front of the first trained one make sums of their own, which are not stored.
        busy = valid & used(tl.where((columns >= first)[None, :], u, 0.0), 1)
        right_tile = right + offsets[:, None] * stride + d[None, :]
        tile = tl.load(right_tile, mask=busy[:, None] & known[None, :], other=0.0)
        if bits is not None:  # noqa: SIM102 - a compile-time condition around a run-time one
            if problem == 0:
                tile = tl.where(kept(bits, rows, valid, column, bits_pitch, BLOCK_D), tile, 0.0)
        acc = tl.dot(tl.trans(tile), u, acc, input_precision="ieee")
    trained = columns - first
    total = widths[0] * count
    if PROBLEMS > 1:
        total += widths[1] * count
    acc = tl.trans(acc)
    plane = planes + split.to(tl.int64) * total + problem * widths[0] * count
    inside = (trained >= 0) & (trained < count)
    tl.store(plane + trained[:, None] * width + d[None, :], acc, mask=inside[:, None] & known[None, :])


@triton.jit
def _reduce_planes(
    planes,  # float32 [PLANES, count]
    outs,  # one or two, together `count` elements, written; `first_count` in the first
    first_count,
    count,
    OUTS: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK: tl.constexpr,
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
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    planes: Tensor,
    first: int,
    tile: GramTile,
    *,
    bits: Tensor | None = None,
) -> Launch:
    """Describe the planes of left^T right for one problem or two.

    Args:
        lefts: dZ, U or one of them: [T, pitch] each; columns beyond the rank are 0.
        rights: X, dY or one of them: [T, D] each, rows of any stride.
        planes: float32 [SPLIT_T, r * sum of the widths]; gradients one after another, each [r, D].
        first: First trained packed row; r of them from there on are trained.
        tile: Block sizes.
        bits: Dropout mask on the first of `rights`, see `dropout_bits`; None for none.
    """
    tokens, pitch = lefts[0].shape
    widths = tuple(right.shape[1] for right in rights)
    count = planes.shape[1] // sum(widths)
    span = first % 16 + count
    block_r = block_of(span, most=tile.block_r)
    return Launch(
        kernel=_gram,
        grid=(
            sum(cdiv(w, tile.block_d) for w in widths),
            cdiv(span, block_r),
            planes.shape[0],
        ),
        arguments={
            "lefts": tuple(lefts),
            "rights": tuple(rights),
            "planes": planes,
            "bits": bits,
            "tokens": tokens,
            "widths": widths,
            "strides": tuple(right.stride(0) for right in rights),
            "pitch": pitch,
            "bits_pitch": 0 if bits is None else bits.shape[1],
            "first": first,
            "count": count,
        },
        constants={
            "PROBLEMS": len(rights),
            "SPLIT_T": planes.shape[0],
            "BLOCK_T": tile.block_t,
            "BLOCK_R": block_r,
            "BLOCK_D": tile.block_d,
            "EVEN_D": all(width % tile.block_d == 0 for width in widths),
        },
        warps=tile.warps,
        stages=tile.stages,
        cost=lambda: (
            nbytes(*rights, planes, bits) + len(lefts) * tokens * count * lefts[0].element_size(),
            2 * tokens * count * sum(widths),
        ),
        steps=cdiv(cdiv(tokens, tile.block_t), planes.shape[0]),
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
        cost=lambda: (nbytes(planes, *outs), 0),
    )
