"""What the kernels share: the gates of packed rows, and small helpers of their launchers.

Where a gate is exactly 0 the product is exactly 0, whatever it is multiplied with (select, not multiply).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from cram_kernels.launch import power_of_two


class Gating(NamedTuple):
    """What turns tokens and packed rows into gates.

    Attributes:
        gates: [S, E] float32, contiguous.
        owner: One [R] integer tensor a stacked projection: the expert of each packed row.
        segments: [T] integers, the gate row of each token, or None for equal blocks of tokens.
        scale: Factor of every gate.
    """

    gates: Tensor
    owner: tuple[Tensor, ...]
    segments: Tensor | None
    scale: float

    def arguments(self, tokens: int) -> dict[str, Any]:
        """Return the arguments that every kernel with gates takes, for calls of so many tokens."""
        samples, experts = self.gates.shape
        return {
            "gates": self.gates,
            "segments": self.segments,
            "owners": self.owner,
            "samples": samples,
            "experts": experts,
            "per_gate": tokens_per_gate(tokens, self.gates),
            "scale": self.scale,
        }


# Triton compiles a kernel anew where an integer is 1 or a multiple of 16, or an address is not. What differs
# from call to call must not: such arguments stand here. Items of a tuple are always specialised, hence
# `encoded`.
FREE = ("gates", "segments", "samples", "experts", "per_gate", "tokens")


def gating(gates: Tensor, owners: Sequence[Tensor], segments: Tensor | None, scale: float) -> Gating:
    """Return gates [S, E] as the kernels read them."""
    samples, experts = gates.shape
    # Their offsets are 32 bits wide: a tile of wider ones takes the registers of the products.
    if gates.numel() >= 1 << 31:
        raise ValueError(f"gates must have fewer than 2^31 elements, got {samples} x {experts}")
    segments = None if segments is None else segments.contiguous()
    return Gating(gates.contiguous(), tuple(owners), segments, scale)


def tokens_per_gate(tokens: int, gates: Tensor) -> int:
    """Return how many consecutive tokens share a row of gates [S, E] where no map says otherwise."""
    return max(tokens // max(gates.shape[0], 1), 1)


def block_of(size: int, least: int = 16, most: int = 128) -> int:
    """Return the power of two in [least, most] that covers `size`, or `most`."""
    return min(max(power_of_two(size), least), most)


def pitch_of(ranks: Sequence[int]) -> int:
    """Return the row pitch of Z: the largest rank rounded up to 16, so that rows start on 32 bytes."""
    return -(-max(ranks) // 16) * 16


def encoded(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return sizes as odd numbers above 1, for which Triton compiles one kernel."""
    return tuple(2 * size + 3 for size in sizes)


@triton.jit
def decoded(size):
    """Return the size that `encoded` made odd."""
    return (size >> 1) - 1


@triton.jit
def stacked(items, index):
    """Return items[index] of a tuple of up to three."""
    STACK: tl.constexpr = len(items)
    item = items[0]
    if STACK > 1:  # noqa: SIM102 - a compile-time condition around a run-time one
        if index == 1:
            item = items[1]
    if STACK > 2:  # noqa: SIM102
        if index == 2:
            item = items[2]
    return item


@triton.jit
def row_gates(gates, segments, owner, samples, experts, per_gate, scale, rows, valid, columns, inside):
    """Return w [T, C]: scale times the gate of each token for the expert of each packed row; 0 outside.

    A token whose row of gates does not exist gets NaN, which shows in its output.
    """
    expert = tl.load(owner + columns, mask=inside, other=0).to(tl.int32)
    if segments is None:
        row, known = rows // per_gate, valid
    else:
        segment = tl.load(segments + rows, mask=valid, other=0)
        known = valid & (segment >= 0) & (segment < samples)
        row = segment.to(tl.int32)
    places = gates + (row * experts)[:, None] + expert[None, :]
    w = tl.load(places, mask=known[:, None] & inside[None, :], other=0.0) * scale
    if segments is not None:
        w = tl.where((valid & ~known)[:, None] & inside[None, :], float("nan"), w)
    return w


@triton.jit
def block_gates(given, tokens, ranks, projection, rows, columns):
    """Return w [T, C] of a block of one stacked projection, 0 beyond its rank.

    `given` is (gates, segments, owners, samples, experts, per_gate, scale).
    """
    gates, segments, owners, samples, experts, per_gate, scale = given
    valid, inside = rows < tokens, columns < decoded(stacked(ranks, projection))
    owner = stacked(owners, projection)
    return row_gates(gates, segments, owner, samples, experts, per_gate, scale, rows, valid, columns, inside)


@triton.jit
def gated(z, w):
    """Return z o w in float32, exactly 0 where w is."""
    return tl.where(w == 0.0, 0.0, z.to(tl.float32) * w)


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def used(u, AXIS: tl.constexpr):
    """Return where u [T, C] holds anything but 0.0 along an axis; NaN and -0.0 count as held."""
    # By its bits: comparing and converting each element takes twice the instructions, and more registers.
    bits = u.to(tl.int16 if u.dtype.primitive_bitwidth == 16 else tl.int32, bitcast=True)
    return tl.reduce(bits, AXIS, _either) != 0
