"""The tables of tiles: what Triton takes, and buckets that cover every number of tokens."""

from __future__ import annotations

import pytest

from cram_kernels.expert_lora import tiles

TABLES = {"shrink": tiles.SHRINK, "expand": tiles.EXPAND, "gram": tiles.GRAM}


@pytest.mark.parametrize("name", TABLES)
def test_rows_are_of_sizes_that_triton_takes_and_cover_all_tokens(name: str) -> None:
    for key, rows in TABLES[name].items():
        *limits, last = (row[0] for row in rows)
        assert last is None and limits == sorted(set(limits)), key
        for _, *sizes, stages in rows:
            # Blocks, splits and warps.
            assert all(size in (1, 4, 8, 16, 32, 64, 128) for size in sizes), (key, sizes)
            # Only SHRINK's loads go ahead of its products.
            assert 3 <= stages <= 4 if name == "shrink" else stages == 1, (key, stages)


def test_a_tile_fits_the_shared_memory_of_its_architecture() -> None:
    for (arch, short), rows in tiles.SHRINK.items():
        for _, block_t, block_r, block_k, _, _, stages in rows:
            needed = stages * (block_t + block_r) * block_k * (2 if short else 4)
            assert needed <= (227 if arch == 90 else 99) * 1024, (arch, short, needed)
