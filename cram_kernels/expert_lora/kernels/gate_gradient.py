"""Gate gradient: dg[s, e] = scale * sum over the segment's tokens and the expert's rows of Z o V.

No division, so it is exact where a gate is 0. Two launches over data that is still in the L2 cache: sums over
the tokens of each segment for every packed row, in slabs of tokens, and sums over the slabs and each expert's
rows, both in order. The first is linear in R and knows no experts; the second finds an expert's rows, which
are neighbours, by bisection. Sums are selected, not multiplied by a mask, so NaN in one expert or segment
stays there. Sums run in float64: a softmax behind the gates subtracts sums that are nearly equal.

Bytes: 2 T R elements, 2 SLABS S R floats and S E floats, small beside a pass over x (R << D).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cram_kernels.expert_lora.kernels.gating import FREE, Gating, block_of, tokens_per_gate
from cram_kernels.launch import Launch, cdiv, nbytes, power_of_two

# Tiles of 2048 elements keep every value of a block in registers; half as many where the second launch reads
# V beside Z. A segment's tokens are cut into at most SLABS slabs of at least LEAST_SLAB tokens, by the
# segment's size bucket alone.
ELEMENTS, BLOCK_E, WARPS = 2048, 8, 4
SLABS, LEAST_SLAB = 32, 256
# Rows of an expert whose loads are in flight together.
UNROLL: tl.constexpr = tl.constexpr(4)


@triton.jit
def _finite_if_unused(value, gate):
    """Return `value`, made finite where the gate is exactly 0: an unused expert may hold NaN."""
    finite = tl.where(value != value, 0.0, tl.minimum(tl.maximum(value, -3.4028234e38), 3.4028234e38))
    return tl.where(gate == 0.0, finite, value)


@triton.jit(do_not_specialize=[*FREE, "slab"])
def _segment_sums(
    z,  # [T, pitch]
    v,  # [T, pitch]
    sums,  # float32 [slabs, S, pitch], written
    segments,  # integers [T], the row of gates of each token, or None
    samples,
    per_gate,
    tokens,
    slab,
    pitch,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    segment = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    stored = columns < pitch
    low, high = segment * per_gate, (segment + 1) * per_gate
    if segments is not None:
        low, high = 0, tokens
    low += tl.program_id(2) * slab
    high = tl.minimum(high, low + slab)
    acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float64)
    for start in range(low, high, BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)
        mine = rows < high
        if segments is not None:
            mine &= tl.load(segments + rows, mask=mine, other=-1) == segment
        if tl.max(mine.to(tl.int32), 0) > 0:
            places = rows.to(tl.int64)[:, None] * pitch + columns[None, :]
            wanted = mine[:, None] & stored[None, :]
            product = tl.load(z + places, mask=wanted, other=0.0).to(tl.float64)
            acc += product * tl.load(v + places, mask=wanted, other=0.0).to(tl.float64)
    place = (tl.program_id(2).to(tl.int64) * samples + segment) * pitch + columns
    tl.store(sums + place, tl.sum(acc, 0), mask=stored)


@triton.jit
def _first_row(owner, experts, count):
    """Return the first of `count` packed rows whose owner is not before each expert."""
    low = tl.zeros_like(experts)
    high = low + count
    step = count
    while step > 0:
        middle = (low + high) // 2
        before = tl.load(owner + middle, mask=middle < count, other=2147483647) < experts
        searching = low < high
        low = tl.where(searching & before, middle + 1, low)
        high = tl.where(searching & ~before, middle, high)
        step //= 2
    return low


@triton.jit(do_not_specialize=[*FREE, "rows", "count", "slabs"])
def _expert_sums(
    z,  # [slabs, rows, pitch]
    v,  # [slabs, rows, pitch] to multiply z with, or None
    out,  # float32 [rows, E], written
    gates,  # float32 [rows, E]
    owner,  # [count], the expert of each packed row
    experts,
    scale,
    rows,
    count,
    slabs,
    pitch,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    samples = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    columns = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    slab = tl.arange(0, BLOCK_K)
    here, known = samples < rows, columns < experts
    start = _first_row(owner, columns, count)
    ranks = tl.where(known, _first_row(owner, columns + 1, count) - start, 0)
    there = here[:, None] & (slab < slabs)[None, :]
    base = (slab.to(tl.int64)[None, :] * rows + samples[:, None]) * pitch
    base = base[:, :, None] + start[None, None, :]
    acc = tl.zeros((BLOCK_S, BLOCK_K, BLOCK_E), tl.float64)
    for first in range(0, tl.max(ranks, 0), UNROLL):
        for row in tl.static_range(UNROLL):
            wanted = there[:, :, None] & (first + row < ranks)[None, None, :]
            product = tl.load(z + base + (first + row), mask=wanted, other=0.0).to(tl.float32)
            if v is not None:
                product *= tl.load(v + base + (first + row), mask=wanted, other=0.0).to(tl.float32)
            acc += product
    places = samples.to(tl.int64)[:, None] * experts + columns[None, :]
    wanted = here[:, None] & known[None, :]
    gate = tl.load(gates + places, mask=wanted, other=0.0)
    tl.store(out + places, _finite_if_unused(tl.sum(acc, 1) * scale, gate), mask=wanted)


def gate_gradient(z: Tensor, v: Tensor, out: Tensor, gating: Gating) -> list[Launch]:
    """Describe dg; one launch where every token has its own gates, else two.

    Args:
        z, v: [T, pitch].
        out: [S, E] float32.
        gating: Gates and one owner.
    """
    (tokens, pitch), (samples, experts) = z.shape, out.shape
    per_gate, mapped = tokens_per_gate(tokens, gating.gates), gating.segments is not None
    if not mapped and per_gate == 1:
        return [_sums_of_experts(z.view(1, tokens, pitch), v.view(1, tokens, pitch), out, gating)]
    block_r = block_of(pitch)
    block_t = max(ELEMENTS // block_r, 1)
    each = tokens if mapped else per_gate
    slab = max(power_of_two(max(each, 1)) // SLABS, LEAST_SLAB)
    sums = out.new_empty(cdiv(each, slab), samples, pitch)
    first = Launch(
        kernel=_segment_sums,
        grid=(samples if experts else 0, cdiv(pitch, block_r), sums.shape[0]),
        arguments={
            "z": z,
            "v": v,
            "sums": sums,
            "segments": gating.segments,
            "samples": samples,
            "per_gate": per_gate,
            "tokens": tokens,
            "slab": slab,
            "pitch": pitch,
        },
        constants={"BLOCK_T": block_t, "BLOCK_R": block_r},
        warps=WARPS,
        stages=1,
        cost=lambda: (nbytes(z, v, sums), 0),
        steps=cdiv(slab, block_t),
    )
    return [first, _sums_of_experts(sums, None, out, gating)]


def _sums_of_experts(z: Tensor, v: Tensor | None, out: Tensor, gating: Gating) -> Launch:
    slabs, rows, pitch = z.shape
    count, experts = gating.owner[0].shape[0], out.shape[1]
    block_k, elements = (SLABS, ELEMENTS) if v is None else (1, ELEMENTS // 2)
    block_s = elements // (BLOCK_E * block_k)
    return Launch(
        kernel=_expert_sums,
        grid=(cdiv(rows, block_s), cdiv(experts, BLOCK_E)),
        arguments={
            "z": z,
            "v": v,
            "out": out,
            "gates": gating.gates,
            "owner": gating.owner[0],
            "experts": experts,
            "scale": gating.scale,
            "rows": rows,
            "count": count,
            "slabs": slabs,
            "pitch": pitch,
        },
        constants={"BLOCK_S": block_s, "BLOCK_K": block_k, "BLOCK_E": BLOCK_E},
        warps=WARPS,
        stages=1,
        cost=lambda: (nbytes(z, v, out), 0),
        steps=cdiv(cdiv(count, max(experts, 1)), UNROLL.value),
    )
