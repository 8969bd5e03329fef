"""Counter-based dropout: the mask is a hash of (seed, row, column), so nothing is stored for backward.

Rows and column pairs are hashed apart, added, and finished by two multiply-xorshift rounds of a 32-bit
integer; each hash decides two neighbouring columns, one by each 16-bit half. The drop probability is
therefore rounded to a multiple of 2^-16, and `keep_scale` is the exact inverse of what is kept on average.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LANES = 1 << 16
_ROUNDS = ((16, 0x7FEB352D), (15, 0x846CA68B))  # "lowbias32", a finaliser with measured avalanche
_GOLDEN = 0x9E3779B9
_WORD = 0xFFFFFFFF


def dropout_mask(
    seed: int | Tensor,
    rows: int,
    cols: int,
    p: float,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bool,
) -> Tensor:
    """Return the keep mask that every implementation uses.

    Args:
        seed: Any integer, or int64 [] on the CPU; equal seeds give equal masks.
        rows: Number of tokens T.
        cols: Number of features D_in.
        p: Probability of dropping, in [0, 1).
        device: Where the mask is made; its value does not depend on it.
        dtype: Of the result. A floating mask to multiply with is cheaper than a bool to select with.

    Returns:
        [rows, cols], True (1) where the element is kept.
    """
    if not torch.compiler.is_compiling():
        seed = int(seed)
    row_word, pair_word = seed_words(seed)
    row_hash = _finish(torch.arange(rows, dtype=torch.int32, device=device) + row_word)
    pair_hash = _finish(torch.arange((cols + 1) // 2, dtype=torch.int32, device=device) + pair_word)
    lanes = _finish(row_hash[:, None] + pair_hash).view(torch.int16)[:, :cols]
    keep = torch.empty(rows, cols, dtype=dtype, device=device)
    return torch.ge(lanes, dropped_lanes(p) - _LANES // 2, out=keep)


def keep_scale(p: float) -> float:
    """Return the factor that keeps the mean unchanged: 1 / (1 - p) for the p that the mask realises."""
    return _LANES / (_LANES - dropped_lanes(p))


def seed_tensor(seed: int | Tensor) -> Tensor:
    """Return a seed as int64 [] on the CPU, where the compiler traces it and nobody waits for its value.

    Raises:
        ValueError: If a tensor is anything else.
    """
    if not isinstance(seed, Tensor):
        if not -(1 << 63) <= seed < 1 << 63:
            seed = _signed(seed & (1 << 64) - 1, 64)
        return torch.tensor(seed, dtype=torch.int64, device="cpu")
    if seed.shape or seed.dtype != torch.int64 or not seed.is_cpu:
        got = f"{seed.dtype} {list(seed.shape)} on {seed.device}"
        raise ValueError(f"seed must be an integer or int64 [] on the CPU, got {got}")
    return seed


def seed_words(seed: Any) -> tuple[Any, Any]:
    """Return the int32 words that a seed adds to row and column-pair numbers before they are hashed.

    They are ints of an int, and int64 [] of a tensor.
    """
    low, high = seed & _WORD, (seed >> 32) & _WORD
    return _signed(_mix(low ^ _GOLDEN)), _signed(_mix(high + _GOLDEN & _WORD))


def dropped_lanes(p: float) -> int:
    """Return how many of the 2^16 values of a 16-bit lane drop the element."""
    return min(round(p * _LANES), _LANES - 1)


def _finish(h: Tensor) -> Tensor:
    """Mix int32 words in place; shifts are made logical by a mask because int32 shifts keep the sign."""
    for shift, factor in _ROUNDS:
        h ^= (h >> shift).bitwise_and_((1 << 32 - shift) - 1)
        h *= _signed(factor)
    h ^= (h >> 16).bitwise_and_(0xFFFF)
    return h


def _mix(word: Any) -> Any:
    """The same finaliser on a Python integer or an int64 tensor, whose products wrap around."""
    for shift, factor in _ROUNDS:
        word = (word ^ word >> shift) * factor & _WORD
    return word ^ word >> 16


def _signed(word: Any, bits: int = 32) -> Any:
    return (word ^ 1 << bits - 1) - (1 << bits - 1)
