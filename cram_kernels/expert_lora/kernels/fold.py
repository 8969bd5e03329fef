"""FOLD: the planes of a split SHRINK added in order, and gated.

    Z = planes[0] + planes[1] + ...        U = Z o w

This is where gates meet packed rows: EXPAND and GRAM read U. A gate is loaded once for each element of
[T, R], not once for each block of columns of Y. U is gated from the float32 sum, so it is rounded once.
Columns of U beyond a rank are 0, and so are those that a gate of 0 selects away, whatever Z holds there.

Bytes: PLANES T R floats, and T R elements for each of Z and U.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from cram_kernels.expert_lora.kernels.gating import (
    FREE,
    Gating,
    block_gates,
    block_of,
    encoded,
    gated,
)
from cram_kernels.launch import Launch, cdiv, nbytes

# Elements of a program: tokens enough to look up each packed row's expert once for several.
ELEMENTS, WARPS = 4096, 4


@triton.jit(do_not_specialize=FREE)
def _fold(
    planes,  # [PLANES, STACK, T, pitch]
    z,  # [STACK, T, pitch] or None, written
    u,  # [STACK, T, pitch], rows u_stride elements apart, written
    gates,  # float32 [S, E]
    segments,  # integers [T], the row of gates of each token, or None
    owners,  # one [r_p] a projection: the expert of each packed row
    samples,
    experts,
    per_gate,
    scale,
    tokens,
    ranks,  # encoded
    pitch,
    u_stride,
    STACK: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    projection = tl.program_id(2)
    lines = (projection.to(tl.int64) * tokens + rows)[:, None]
    places = lines * pitch + columns[None, :]
    stored = (rows < tokens)[:, None] & (columns < pitch)[None, :]
    total = tl.load(planes + places, mask=stored, other=0.0).to(tl.float32)
    for plane in tl.static_range(1, PLANES):
        total += tl.load(
            planes + plane * STACK * tl.cast(tokens, tl.int64) * pitch + places, mask=stored, other=0.0
        )
    given = gates, segments, owners, samples, experts, per_gate, scale
    w = block_gates(given, tokens, ranks, projection, rows, columns)
    if z is not None:
        tl.store(z + places, total.to(z.dtype.element_ty), mask=stored)
    tl.store(u + lines * u_stride + columns[None, :], gated(total, w).to(u.dtype.element_ty), mask=stored)


def fold(planes: Tensor, z: Tensor | None, u: Tensor, gating: Gating, ranks: Sequence[int]) -> Launch:
    """Describe the sum of the planes and its gating.

    Args:
        planes: [PLANES, STACK, T, pitch], contiguous; float32, or Z itself as one plane.
        z: [STACK, T, pitch], contiguous; written, or None.
        u: As z, or for one projection rows of any stride; written.
        gating: Gates and one owner a projection.
        ranks: Packed rows of each projection.
    """
    count, stack, tokens, pitch = planes.shape
    block_r = block_of(pitch)
    block_t = max(ELEMENTS // block_r, 1)
    return Launch(
        kernel=_fold,
        grid=(cdiv(tokens, block_t), cdiv(pitch, block_r), stack),
        arguments={
            "planes": planes,
            "z": z,
            "u": u,
            **gating.arguments(tokens),
            "tokens": tokens,
            "ranks": encoded(ranks),
            "pitch": pitch,
            "u_stride": u.stride(1),
        },
        constants={
            "STACK": stack,
            "PLANES": count,
            "BLOCK_T": block_t,
            "BLOCK_R": block_r,
        },
        warps=WARPS,
        stages=1,
        cost=lambda: (nbytes(planes, z, u), 0),
    )
