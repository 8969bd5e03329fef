"""The counter-based dropout mask."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch

from cram_kernels import dropout_mask, expert_lora
from cram_kernels.expert_lora.dropout import dropped_lanes, keep_scale, seed_tensor, seed_words
from cram_kernels.testing import GATINGS, layer_inputs, layer_oracle, run_layer
from tests.cram_kernels.devices import needs_native


def scalar_keep(seed: int, row: int, col: int, threshold: int) -> bool:
    """The documented scheme on Python integers, for one element."""

    def finish(h: int) -> int:
        h &= 0xFFFFFFFF
        h = (h ^ h >> 16) * 0x7FEB352D & 0xFFFFFFFF
        h = (h ^ h >> 15) * 0x846CA68B & 0xFFFFFFFF
        return h ^ h >> 16

    low, high = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    row_hash = finish(row + finish(low ^ 0x9E3779B9))
    pair_hash = finish(col // 2 + finish(high + 0x9E3779B9))
    lane = finish(row_hash + pair_hash) >> 16 * (col % 2) & 0xFFFF
    return (lane ^ 0x8000) >= threshold


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3, 2**63 - 1])
def test_scheme(seed: int) -> None:
    """The bits are a contract: other implementations must draw the same mask."""
    expected = [[scalar_keep(seed, row, col, 1 << 14) for col in range(9)] for row in range(20)]
    assert dropout_mask(seed, 20, 9, 0.25).tolist() == expected


def test_a_probability_is_rounded_to_the_nearest_lane_and_keeps_one() -> None:
    assert dropped_lanes(0.05) == 3277 and dropped_lanes(0.1) == 6554 and dropped_lanes(0.0) == 0
    assert dropped_lanes(1 - 1e-9) == 2**16 - 1
    assert keep_scale(0.05) == 2**16 / (2**16 - 3277)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_rate_and_independence(p: float) -> None:
    mask = dropout_mask(3, 1000, 257, p, dtype=torch.float64)
    deviation = (p * (1 - p)) ** 0.5
    assert abs(mask.mean() - (1 - p)) < 5 * deviation / mask.numel() ** 0.5
    assert (mask.mean(0) - (1 - p)).abs().max() < 5 * deviation / 1000**0.5
    assert (mask.mean(1) - (1 - p)).abs().max() < 5 * deviation / 257**0.5
    centred = mask - mask.mean()
    for rows, cols in ((0, 1), (0, 2), (1, 0), (2, 1), (16, 16)):
        lagged = centred[rows:, cols:] * centred[: 1000 - rows, : 257 - cols]
        assert abs(lagged.mean()) < 5 * deviation**2 / lagged.numel() ** 0.5


def test_seeds_give_unrelated_masks() -> None:
    masks = [
        dropout_mask(seed, 200, 100, 0.5, dtype=torch.float64) - 0.5 for seed in (0, 1, 1 << 32, -1, 1 << 63)
    ]
    for first, second in itertools.combinations(masks, 2):
        assert abs((first * second).mean()) < 5 * 0.25 / 20000**0.5


def test_a_seed_of_more_than_63_bits_wraps_around() -> None:
    for seed in (1 << 63, (1 << 64) - 1, -(1 << 63) - 1):
        assert int(seed_tensor(seed)) == (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def test_prefix_property() -> None:
    """An element's fate depends on its own row and column only, so tiles can be drawn apart."""
    assert torch.equal(dropout_mask(5, 40, 30, 0.4)[:7, :11], dropout_mask(5, 7, 11, 0.4))


@pytest.mark.parametrize("seed", [0, 1, -1, 1 << 32, (1 << 63) - 1, -(1 << 63)])
def test_a_tensor_is_a_seed(seed: int) -> None:
    """Also as words that are traced, whose products wrap around in int64."""
    given = torch.tensor(seed)
    assert torch.equal(dropout_mask(given, 7, 9, 0.5), dropout_mask(seed, 7, 9, 0.5))
    assert [int(word) for word in seed_words(given)] == list(seed_words(seed))
    assert all(-(1 << 31) <= word < 1 << 31 for word in seed_words(seed))
    inputs = layer_inputs()
    for impl in ("reference", "cpu"):
        found = [run_layer(inputs, impl, dropout=0.25, seed=value) for value in (seed, given)]
        torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize(
    "seed", [torch.tensor([1]), torch.tensor(1, dtype=torch.int32), torch.tensor(1, device="meta")]
)
def test_a_seed_of_another_kind_is_refused(seed: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"seed must be an integer or int64 \[\] on the CPU, got"):
        run_layer(layer_inputs(), "cpu", dropout=0.25, seed=seed)


@pytest.mark.parametrize(("rows", "cols", "p"), [(0, 8, 0.5), (3, 0, 0.5), (3, 5, 0.0), (4, 4, 0.9999999)])
def test_borders(rows: int, cols: int, p: float) -> None:
    mask = dropout_mask(0, rows, cols, p)
    assert mask.shape == (rows, cols) and (p or mask.all())
    assert torch.isfinite(torch.tensor(keep_scale(p)))


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("gating", GATINGS)
def test_layer_against_oracle(gating: str, impl: str) -> None:
    inputs = layer_inputs(gating=gating, dtype=torch.float64)
    oracle = layer_oracle(inputs, dropout_mask(11, *inputs.x.shape, 0.25), keep_scale(0.25))
    torch.testing.assert_close(run_layer(inputs, impl, dropout=0.25, seed=11), oracle, rtol=1e-12, atol=1e-12)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(run_layer(inputs, impl, dropout=0.25, seed=12), oracle)


def test_dropout_is_off_by_default() -> None:
    inputs = layer_inputs(trained=0)
    arguments = (inputs.x, inputs.weight, inputs.bias, inputs.experts(), inputs.gates)
    assert torch.equal(expert_lora(*arguments), expert_lora(*arguments, dropout=0.0, seed=3))


PEAKS = """
import resource, torch
from cram_kernels import expert_lora, pack_experts
torch.set_num_threads(1)
experts = pack_experts([torch.ones(8, 512)], [torch.ones(64, 8)], 1.0, trained=1)
x, weight, gates = torch.ones(30000, 512), torch.ones(64, 512), torch.ones(1, 1)
for dropout in (0.0, 0.3):
    y = expert_lora(x, weight, None, experts, gates, dropout=dropout, seed=1, impl="native")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    y.backward(y.detach())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@needs_native
def test_native_backward_holds_a_part_of_the_dropped_input() -> None:
    """30,000 rows of 512 columns are 60 MB; a part of the columns is held at a time."""
    found = subprocess.run([sys.executable, "-c", PEAKS], check=True, capture_output=True, text=True)
    assert int(found.stdout) < 20_000
