"""The dropout mask of a call as bits: hashed once, read by SHRINK, GRAM and EXPAND.

Bit j of byte k of a row is column 8 k + j; a row takes `bits_pitch` bytes. The values are those of
`cram_kernels.dropout_mask`.

Bytes: T D_in / 8 written.  FLOPs: none; about 8 integer operations an element.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from cram_kernels.expert_lora.dropout import dropped_lanes, seed_words
from cram_kernels.expert_lora.kernels.gating import decoded, encoded
from cram_kernels.launch import Launch, cdiv, nbytes

BLOCK_T, BLOCK_BYTES, WARPS = 16, 64, 4


class Dropout(NamedTuple):
    """Kernel argument: the two seed words and how many of the 2^16 lanes are dropped.

    A word comes as two 16-bit halves, and each number as `encoded` makes it, so that new seeds compile
    nothing.
    """

    row_high: Any
    row_low: Any
    pair_high: Any
    pair_low: Any
    dropped: Any


def dropout_words(p: float, seed: int) -> Dropout:
    """Return the kernel's view of a dropout with probability p."""
    row, pair = ((word >> 16 & 0xFFFF, word & 0xFFFF) for word in seed_words(seed))
    return Dropout(*encoded((*row, *pair, dropped_lanes(p))))


def bits_pitch(width: int) -> int:
    """Return the bytes of a row of bits: a multiple of 16, so that rows load by 16 bytes."""
    return cdiv(width, 128) * 16


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
    return tl.cast(decoded(high), tl.uint32) << 16 | tl.cast(decoded(low), tl.uint32)


@triton.jit(do_not_specialize=["tokens"])
def _dropout_bits(
    bits,  # uint8 [T, pitch], written
    dropout,
    tokens,
    pitch,
    BLOCK_T: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)
    row_hash = _finish(rows.to(tl.uint32) + _word(dropout.row_high, dropout.row_low))
    # A lane of 16 bits is kept from `dropped` - 2^15 on, as a signed number: the upper one where the whole
    # word is.
    edge = (decoded(dropout.dropped) - 32768) << 16
    found = tl.zeros((BLOCK_T, BLOCK_BYTES), tl.int32)
    for pair in tl.static_range(4):
        pairs = (columns * 4 + pair).to(tl.uint32)
        pair_hash = _finish(pairs + _word(dropout.pair_high, dropout.pair_low))
        words = _finish(row_hash[:, None] + pair_hash[None, :]).to(tl.int32, bitcast=True)
        found |= tl.where(words >= edge, 2 << 2 * pair, 0) | tl.where((words << 16) >= edge, 1 << 2 * pair, 0)
    places = bits + rows.to(tl.int64)[:, None] * pitch + columns[None, :]
    tl.store(places, found.to(tl.uint8), mask=(rows < tokens)[:, None] & (columns < pitch)[None, :])


@triton.jit
def kept(bits, rows, valid, first, pitch, BLOCK_D: tl.constexpr):
    """Return the mask of rows [T] and the BLOCK_D columns from `first`, a multiple of 8: [T, BLOCK_D]."""
    columns = first // 8 + tl.arange(0, BLOCK_D // 8)
    places = bits + rows.to(tl.int64)[:, None] * pitch + columns[None, :]
    found = tl.load(places, mask=valid[:, None] & (columns < pitch)[None, :], other=0)
    lanes = (found[:, :, None] >> tl.arange(0, 8).to(tl.uint8)[None, None, :]) & 1
    return tl.reshape(lanes, (rows.shape[0], BLOCK_D)) != 0


def dropout_bits(bits: Tensor, p: float, seed: int) -> Launch:
    """Describe the mask of [T, D].

    Args:
        bits: uint8 [T, bits_pitch(D)], contiguous; written.
        p: Probability of dropping.
        seed: Seed of the mask.
    """
    tokens, pitch = bits.shape
    return Launch(
        kernel=_dropout_bits,
        grid=(cdiv(tokens, BLOCK_T), cdiv(pitch, BLOCK_BYTES)),
        arguments={"bits": bits, "dropout": dropout_words(p, seed), "tokens": tokens, "pitch": pitch},
        constants={"BLOCK_T": BLOCK_T, "BLOCK_BYTES": BLOCK_BYTES},
        warps=WARPS,
        stages=1,
        cost=lambda: (nbytes(bits), 0),
    )
