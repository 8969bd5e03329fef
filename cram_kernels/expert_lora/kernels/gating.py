"""What the kernels share: gates applied on load, and the dropout mask made again.

Where a gate is exactly 0 the product is exactly 0, whatever it is multiplied with (select, not multiply).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from cram_kernels.expert_lora.dropout import dropped_lanes, seed_words
from cram_kernels.launch import power_of_two


class Gating(NamedTuple):
    """Kernel argument: what turns tokens and packed rows into gates.

    Attributes:
        gates: [S, E] float32, contiguous.
        owner: One [R] integer tensor a stacked projection: the expert of each packed row.
        segments: [T] integers, the gate row of each token, or None for equal blocks of tokens.
        samples: S.
        experts: E.
        scale: Factor of every gate.
    """

    gates: Any
    owner: Any
    segments: Any
    samples: Any
    experts: Any
    scale: Any


class Dropout(NamedTuple):
    """Kernel argument: the two seed words and how many of the 2^16 lanes are dropped; zeros for none.

    A word comes as two 16-bit halves, each doubled plus one: Triton compiles a kernel anew for an integer
    that is a multiple of 16, which an odd one never is, so new seeds compile nothing.
    """

    row_high: Any
    row_low: Any
    pair_high: Any
    pair_low: Any
    dropped: Any


def gating(gates: Tensor, owners: Sequence[Tensor], segments: Tensor | None, scale: float) -> Gating:
    """Return the kernels' view of gates [S, E]."""
    samples, experts = gates.shape
    # Their offsets are 32 bits wide: a tile of wider ones takes the registers of the products.
    if gates.numel() >= 1 << 31:
        raise ValueError(f"gates must have fewer than 2^31 elements, got {samples} x {experts}")
    segments = None if segments is None else segments.contiguous()
    return Gating(gates.contiguous(), tuple(owners), segments, samples, experts, scale)


def tokens_per_gate(tokens: int, gates: Tensor) -> int:
    """Return how many consecutive tokens share a row of gates [S, E] where no map says otherwise."""
    return max(tokens // max(gates.shape[0], 1), 1)


def dropout_words(p: float, seed: int) -> Dropout:
    """Return the kernels' view of a dropout with probability p."""
    if not p:
        return Dropout(0, 0, 0, 0, 0)
    row, pair = ((2 * (word >> 16 & 0xFFFF) + 1, 2 * (word & 0xFFFF) + 1) for word in seed_words(seed))
    return Dropout(*row, *pair, dropped_lanes(p))


def block_of(size: int, least: int = 16, most: int = 128) -> int:
    """Return the power of two in [least, most] that covers `size`, or `most`."""
    return min(max(power_of_two(size), least), most)


def pitch_of(ranks: Sequence[int]) -> int:
    """Return the row pitch of Z: the largest rank rounded up to 16, so that rows start on 32 bytes."""
    return -(-max(ranks) // 16) * 16


@triton.jit
def stacked(items, index, STACK: tl.constexpr):
    """Return items[index] of a tuple of up to three."""
    item = items[0]
    if STACK > 1:  # noqa: SIM102 - a compile-time condition around a run-time one
        if index == 1:
            item = items[1]
    if STACK > 2:  # noqa: SIM102
        if index == 2:
            item = items[2]
    return item


@triton.jit
def gate_row(gating, rows, valid, tokens_per_gate, MAPPED: tl.constexpr):
    """Return the row of gates [S, E] that each token uses; -1 for one that does not exist."""
    if MAPPED:
        row = tl.load(gating.segments + rows, mask=valid, other=0)
        return tl.where((row >= 0) & (row < gating.samples), row, -1).to(tl.int32)
    return rows // tokens_per_gate


@triton.jit
def row_gates(gating, owner, gate_row, valid, columns, inside):
    """Return w: scale times the gate of each token for the expert of each packed row; 0 outside.

    The tokens (`gate_row`, `valid`) and the packed rows (`columns`, `inside`) come as [T, 1] and [1, C], or
    the other way round. A token whose row of gates does not exist gets NaN, which shows in its output.
    """
    experts = tl.load(owner + columns, mask=inside, other=0).to(tl.int32)
    offsets = gate_row * gating.experts + experts
    w = tl.load(gating.gates + offsets, mask=valid & inside & (gate_row >= 0), other=0.0) * gating.scale
    return tl.where(valid & inside & (gate_row < 0), float("nan"), w)


@triton.jit
def gated(z, w):
    """Return z o w in float32, exactly 0 where w is."""
    return tl.where(w == 0.0, 0.0, z.to(tl.float32) * w)


@triton.jit
def _finish(h):
    """Mix uint32 words; the two rounds of `dropout_mask`."""
    h ^= h >> 16
    h *= 0x7FEB352D
    h ^= h >> 15
    h *= 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def _word(high, low):
    """Return the seed word of two halves as `Dropout` holds them."""
    return (tl.cast(high, tl.uint32) >> 1 << 16) | (tl.cast(low, tl.uint32) >> 1)


@triton.jit
def kept(dropout, rows, columns):
    """Return the mask of `dropout_mask` for rows and columns: [T, D], about 12 integer operations each."""
    row_hash = _finish(rows.to(tl.uint32) + _word(dropout.row_high, dropout.row_low))
    pair_hash = _finish((columns // 2).to(tl.uint32) + _word(dropout.pair_high, dropout.pair_low))
    mixed = _finish(row_hash[:, None] + pair_hash[None, :])
    lane = (mixed >> ((columns % 2) * 16).to(tl.uint32)[None, :]) & 0xFFFF
    return (lane ^ 0x8000) >= tl.cast(dropout.dropped, tl.uint32)
