"""Tiles of the Triton kernels: one row per architecture, precision and size bucket, with its reason.

A bucket is chosen by the largest T it takes, never by T itself, and split counts follow from the bucket and
the layer's widths: a row of a batch is computed alike whatever the other rows are, and nothing is tuned at
run time. `python -m benchmarks tune` measures the candidates on a GPU. What no GPU has measured says "by
arithmetic".

Arithmetic of the rows (H200: 132 multiprocessors, 4.3 TB/s from memory, about 5.5 TB/s from the L2 cache):
SHRINK moves (1 + R / BLOCK_T) times x through the L2, so large T wants BLOCK_T of 128 and a split K to fill
the machine; EXPAND moves (1 + R / (2 BLOCK_T) + R / (2 BLOCK_D)) times its two passes over y.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch

PROCESSORS = {80: 108, 90: 132, 100: 148}
# Compute capabilities whose programs may take 227 KB of shared memory; the rows of 80 keep to the 99 KB that
# every other one has (RTX 4090: 89, RTX 5090: 120). Source: CUDA programming guide, technical specifications.
LARGE_SHARED = frozenset({90, 100, 103, 110})
# K elements a split keeps at least: fewer leave the software pipeline nothing to overlap.
LEAST_SPAN = 512


@dataclass(frozen=True)
class ShrinkTile:
    """SHRINK's blocks; `block_r` is the most packed rows a program takes."""

    block_t: int
    block_r: int
    block_k: int
    split_k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class ExpandTile:
    """EXPAND's blocks; `block_r` is the most packed rows a step takes."""

    block_t: int
    block_r: int
    block_d: int
    warps: int
    stages: int


@dataclass(frozen=True)
class GramTile:
    """GRAM's blocks; `block_r` is the most trained rows a program takes."""

    block_t: int
    block_r: int
    block_d: int
    split_t: int
    warps: int
    stages: int


# Largest T of the bucket (None: any) -> (BLOCK_T, most BLOCK_R, BLOCK_K, most SPLIT_K, warps, stages).
ShrinkRow = tuple[int | None, int, int, int, int, int, int]
SHRINK: dict[tuple[int, bool], list[ShrinkRow]] = {
    (90, True): [
        # Latency-bound: many small programs, each with all its loads in flight; planes are summed by EXPAND.
        (64, 16, 16, 128, 8, 4, 4),
        (512, 32, 64, 128, 8, 4, 3),
        # One wave of 132 programs; the whole packed rank in one tile, x read once.
        (2048, 64, 128, 64, 4, 4, 4),
        # BLOCK_T 128 halves the traffic of A through the L2; the split refills the machine.
        (8192, 128, 128, 64, 4, 8, 4),
        (None, 128, 128, 64, 1, 8, 4),
    ],
    (90, False): [
        # float32 products run on the scalar units: tiles that fit the registers.
        (64, 16, 16, 64, 8, 4, 3),
        (8192, 32, 64, 32, 4, 4, 3),
        (None, 32, 64, 32, 1, 4, 3),
    ],
    # At most 99 KB of shared memory: as above with three stages.
    (80, True): [
        (64, 16, 16, 128, 8, 4, 3),
        (512, 32, 64, 64, 8, 4, 3),
        (2048, 64, 128, 64, 4, 4, 3),
        (8192, 128, 128, 32, 4, 8, 3),
        (None, 128, 128, 32, 1, 8, 3),
    ],
    (80, False): [(64, 16, 16, 64, 8, 4, 3), (8192, 32, 64, 32, 4, 4, 3), (None, 32, 64, 32, 1, 4, 3)],
}

# A decode step whose base products run in one launch with SHRINK (`kernels.stream`): largest T of the bucket
# -> (BLOCK_T, BLOCK_R, BLOCK_K, SPLIT_K, warps, stages). Beyond the last row, the library multiplies by W.
# Off: it saves a launch, about 2 us, where it streams W as fast as the library does, which only a GPU can say
# (`python -m benchmarks experiments` asks).
StreamRow = tuple[int | None, int, int, int, int, int, int]
STREAM: dict[tuple[int, bool], list[StreamRow]] = {
    (90, True): [],
    (90, False): [],
    (80, True): [],
    (80, False): [],
}

# Largest T of the bucket -> (BLOCK_T, most BLOCK_R, BLOCK_D, warps, stages).
ExpandRow = tuple[int | None, int, int, int, int, int]
EXPAND: dict[tuple[int, bool], list[ExpandRow]] = {
    (90, True): [
        # D_out / 64 programs. One step for up to 128 packed rows: F is loaded before the wait; 8 warps keep
        # more loads in flight.
        (64, 16, 128, 64, 8, 1),
        (1024, 64, 64, 128, 4, 1),
        # 8 warps and steps of 64 packed rows keep to 128 registers, so that two programs share a
        # multiprocessor: one hides the other's waiting, and there is no pipeline to fill.
        (None, 128, 64, 128, 8, 1),
    ],
    (90, False): [(64, 16, 64, 32, 4, 1), (None, 32, 32, 64, 4, 1)],
    (80, True): [(64, 16, 128, 64, 8, 1), (1024, 64, 64, 128, 4, 1), (None, 128, 64, 128, 8, 1)],
    (80, False): [(64, 16, 64, 32, 4, 1), (None, 32, 32, 64, 4, 1)],
}

# Largest T of the bucket -> (BLOCK_T, most BLOCK_R, BLOCK_D, most SPLIT_T, warps, stages).
GramRow = tuple[int | None, int, int, int, int, int, int]
GRAM: dict[tuple[int, bool], list[GramRow]] = {
    # D / 128 programs a gradient; the split over tokens makes three waves of them. One stage: X and dY are
    # loaded where U says that they are needed, and three or four programs on a multiprocessor hide each
    # other's waiting.
    (90, True): [(512, 32, 64, 128, 4, 4, 1), (None, 64, 64, 128, 8, 8, 1)],
    (90, False): [(None, 32, 32, 64, 8, 4, 1)],
    (80, True): [(512, 32, 64, 128, 4, 4, 1), (None, 64, 64, 128, 8, 8, 1)],
    (80, False): [(None, 32, 32, 64, 8, 4, 1)],
}


@dataclass(frozen=True)
class Order:
    """How the base product and EXPAND share their result Y.

    Attributes:
        chunk: Tokens that go through both before the next ones do, or None for all at once. While a chunk of
            Y fits the L2 cache, the second finds what the first wrote.
        base_last: EXPAND writes Y with the bias, and the base product adds to it (beta = 1), which hides the
            read of Y behind its products and rounds once less. Otherwise EXPAND adds to the base product.
    """

    chunk: int | None = None
    base_last: bool = False

    def chunks(self, tokens: int) -> list[slice]:
        """Return the rows of each chunk."""
        chunk = self.chunk or max(tokens, 1)
        return [slice(start, start + chunk) for start in range(0, tokens, chunk)]


# Largest T of the bucket -> how. 4096 tokens of width 4096 in two bytes take 32 of the 50 MB of an H200's L2
# cache.
OrderRow = tuple[int | None, int | None, bool]
ORDER: dict[tuple[int, bool], list[OrderRow]] = {
    (90, True): [(4096, None, False), (None, 4096, False)],
    (90, False): [(None, None, False)],
    (80, True): [(None, None, False)],
    (80, False): [(None, None, False)],
}


Row = TypeVar("Row", ShrinkRow, StreamRow, ExpandRow, GramRow, OrderRow)


@lru_cache(4096)
def shrink_tile(arch: int, dtype: torch.dtype, tokens: int, rank: int, width: int) -> ShrinkTile:
    """Return the tile of X [tokens, width] A^T [width, rank]."""
    limit, block_t, block_r, block_k, split_k, warps, stages = _row(SHRINK, arch, dtype, tokens)
    programs = -(-(limit or block_t) // block_t) * -(-rank // block_r)
    most = max(1, min(split_k, width // LEAST_SPAN))
    wanted = max(1, -(-PROCESSORS[_known(arch)] // programs))
    return ShrinkTile(block_t, block_r, block_k, min(most, wanted), warps, stages)


@lru_cache(4096)
def stream_tile(arch: int, dtype: torch.dtype, tokens: int, width: int) -> ShrinkTile | None:
    """Return the tile of a decode step's W and A in one launch; None where the library takes W."""
    rows = STREAM[_table(arch, dtype)]
    fitting = [row for row in rows if row[0] is None or tokens <= row[0]]
    return streamed(fitting[0], width) if fitting else None


def streamed(row: StreamRow, width: int) -> ShrinkTile:
    """Return the tile of a row of `STREAM` for weights of so many columns."""
    _, block_t, block_r, block_k, split_k, warps, stages = row
    return ShrinkTile(block_t, block_r, block_k, max(1, min(split_k, width // LEAST_SPAN)), warps, stages)


@lru_cache(4096)
def expand_tile(arch: int, dtype: torch.dtype, tokens: int) -> ExpandTile:
    """Return the tile of Y [tokens, D] += U F."""
    _, *row = _row(EXPAND, arch, dtype, tokens)
    return ExpandTile(*row)


@lru_cache(4096)
def gram_tile(arch: int, dtype: torch.dtype, tokens: int, width: int) -> GramTile:
    """Return the tile of the gradients of total `width` (D_in + D_out, or one of them)."""
    _, block_t, block_r, block_d, split_t, warps, stages = _row(GRAM, arch, dtype, tokens)
    wanted = -(-3 * PROCESSORS[_known(arch)] // max(1, width // block_d))
    return GramTile(block_t, block_r, block_d, max(1, min(split_t, wanted)), warps, stages)


@lru_cache(4096)
def order(arch: int, dtype: torch.dtype, tokens: int) -> Order:
    """Return how the base product and EXPAND share their result."""
    _, chunk, base_last = _row(ORDER, arch, dtype, tokens)
    return Order(chunk, base_last)


def _known(arch: int) -> int:
    """Return the newest architecture with a row of its own that is not newer than `arch`."""
    return max((known for known in PROCESSORS if known <= arch), default=80)


def _row(table: dict[tuple[int, bool], list[Row]], arch: int, dtype: torch.dtype, tokens: int) -> Row:
    return next(row for row in table[_table(arch, dtype)] if row[0] is None or tokens <= row[0])


def _table(arch: int, dtype: torch.dtype) -> tuple[int, bool]:
    return 90 if arch in LARGE_SHARED else 80, dtype.itemsize == 2
