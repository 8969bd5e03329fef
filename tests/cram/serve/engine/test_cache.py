"""The key-value allocation: rows that join and leave keep exactly their own keys and values."""

from __future__ import annotations

import random

import pytest
import torch
from transformers.cache_utils import DynamicCache

from cram.serve.engine.cache import FIRST_COLUMNS, RowCache

HEADS, WIDTH, LAYERS = 2, 3, 2


def prefill(length: int) -> DynamicCache:
    """A cache of one row with random keys and values."""
    cache = DynamicCache()
    for layer in range(LAYERS):
        cache.update(*(torch.randn(1, HEADS, length, WIDTH) for _ in range(2)), layer)
    return cache


@pytest.mark.parametrize("seed", range(5))
def test_rows_keep_their_own_through_joins_steps_and_leaves(seed: int) -> None:
    chance = random.Random(seed)
    cache, rows = RowCache(), []  # per row: keys of all layers [LAYERS, HEADS, length, WIDTH]
    for _ in range(250):
        if rows and chance.random() < 0.05:
            gone = chance.randrange(len(rows))
            cache.drop(gone)
            rows[gone] = rows[-1]
            rows.pop()
        if chance.random() < 0.06 or not rows:
            made, copies = prefill(chance.choice([1, 5, 30, 90])), chance.choice([1, 3])
            cache.join(made, copies)
            rows += [torch.stack([layer.keys[0] for layer in made.layers])] * copies
        cache.reserve_column()
        new = torch.randn(LAYERS, len(rows), HEADS, 1, WIDTH)
        mask = cache.mask(torch.device("cpu")).bool()
        for layer in range(LAYERS):
            keys, values = cache.update(new[layer], -new[layer], layer)
            assert keys.shape == (len(rows), HEADS, mask.shape[1], WIDTH) == values.shape
            for row, before in enumerate(rows):
                wanted = torch.cat([before[layer], new[layer, row]], dim=1)
                assert torch.equal(keys[row][:, mask[row]], wanted)
        cache.advance()
        rows = [torch.cat([before, new[:, row]], dim=2) for row, before in enumerate(rows)]
        assert cache.lengths() == [row.shape[2] for row in rows]


def test_the_allocation_is_reused_by_later_rows() -> None:
    cache = RowCache()
    cache.join(prefill(10), 1)
    size = cache.num_bytes
    for _ in range(40):
        cache.join(prefill(10), 1)
        cache.drop(0)
        for _ in range(3):
            cache.reserve_column()
            for layer in range(LAYERS):
                cache.update(*(torch.zeros(1, HEADS, 1, WIDTH) for _ in range(2)), layer)
            cache.advance()
    # 130 columns have been written, and no row was ever longer than 13.
    assert cache.num_bytes == 2 * size
    assert size == 2 * LAYERS * HEADS * FIRST_COLUMNS * WIDTH * 4


def test_values_of_an_earlier_row_do_not_stay() -> None:
    cache = RowCache()
    cache.join(prefill(20), 2)
    for layer in cache.layers:
        layer.keys[1] = layer.values[1] = float("nan")
    cache.drop(1)
    cache.join(prefill(5), 1)
    for layer in cache.layers:
        assert torch.isfinite(layer.keys[:2, :, : cache.end]).all()


def test_a_layer_that_has_forgotten_the_prompts_beginning_is_refused() -> None:
    made = prefill(8)
    made.layers[1].keys = made.layers[1].keys[:, :, 3:]
    with pytest.raises(NotImplementedError, match="sliding window"):
        RowCache().join(made, 1)
