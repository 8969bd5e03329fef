"""Which products are the library's own: the row in force, its unit, and what does not depend on either."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from cram_kernels import PackedExperts, expert_lora, native_libraries
from cram_kernels.crossovers import UNITS, Crossovers, crossovers, rounds_factors, set_crossovers
from cram_kernels.testing import LayerInputs, assert_within_rounding, layer_inputs, run_layer

_MISSING = native_libraries()["cpu"]
pytestmark = pytest.mark.skipif(_MISSING is not None, reason=str(_MISSING))

BF16 = torch.bfloat16
NEVER, ALWAYS = Crossovers("", "", 1, 0, 0, 1, 0, 0), Crossovers("", "", *(1, 1 << 20, 1 << 20) * 2)


@pytest.fixture(autouse=True)
def table() -> Iterator[None]:
    yield
    set_crossovers(None)


def wide(tokens: int, dtype: torch.dtype = BF16) -> LayerInputs:
    """More rows than a tile is deep, and widths that fill no tile."""
    return layer_inputs((9, 30, 14), tokens, 150, 203, segment_count=tokens).to(dtype)


def test_the_row_in_force_is_one_of_the_table() -> None:
    found = crossovers()
    assert found is not None
    row, reason = found
    assert (row.unit == "tiles") == (reason == "")
    set_crossovers(ALWAYS)
    assert crossovers() == (replace(ALWAYS, vendor=row.vendor, unit=row.unit), reason)
    set_crossovers(None)
    assert crossovers() == found


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("row", [NEVER, ALWAYS], ids=["torch", "own"])
@pytest.mark.parametrize("unit", UNITS)
def test_every_unit_with_either_base(unit: str, row: Crossovers, dropout: float) -> None:
    """bfloat16; a unit that the processor does not have falls to the next."""
    from cram_kernels import dropout_mask, keep_scale

    set_crossovers(row, unit)
    for tokens in (3, 33, 300):
        inputs = wide(tokens)
        keep = dropout_mask(5, *inputs.x.shape, dropout) if dropout else None
        found = run_layer(inputs, "native", dropout=dropout, seed=5)
        assert_within_rounding(found, inputs, keep, keep_scale(dropout) if dropout else 1.0)


@pytest.mark.parametrize("unit", UNITS)
def test_own_base_gives_a_sample_the_same_bits_in_any_batch(unit: str) -> None:
    set_crossovers(ALWAYS, unit)
    inputs = wide(70)
    experts = inputs.experts().freeze()
    whole = expert_lora(inputs.x, inputs.weight, inputs.bias, experts, inputs.gates, impl="native")
    for t in (0, 17, 69):
        rows = slice(t, t + 1)
        one = expert_lora(
            inputs.x[rows], inputs.weight, inputs.bias, experts, inputs.gates[rows], impl="native"
        )
        assert torch.equal(one, whole[rows])


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("ranks", [(3, 5, 40, 2, 7), (130, 9, 130, 1, 60)], ids=["few-rows", "many-rows"])
@pytest.mark.parametrize("unit", UNITS)
def test_neighbours_with_other_experts_change_no_bit(
    unit: str, ranks: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Each token uses some experts and no other; alone, the rows of the others are not there."""
    set_crossovers(ALWAYS, unit)
    tokens = 64  # with so many sums some differ even after their rounding to bfloat16
    inputs = layer_inputs(ranks, tokens, 70, 2100, segment_count=tokens).to(dtype)
    gates = inputs.gates * (torch.rand(tokens, 5, generator=torch.Generator().manual_seed(0)) < 0.4)
    assert len({tuple(row) for row in (gates != 0).tolist()}) > 4
    experts = inputs.experts().freeze()
    whole = expert_lora(inputs.x, inputs.weight, inputs.bias, experts, gates, impl="native")
    for t in range(tokens):
        rows = slice(t, t + 1)
        one = expert_lora(inputs.x[rows], inputs.weight, inputs.bias, experts, gates[rows], impl="native")
        assert torch.equal(one, whole[rows])


@pytest.mark.parametrize("row", [NEVER, ALWAYS], ids=["torch", "own"])
@pytest.mark.parametrize("unit", UNITS)
def test_copies_of_a_frozen_pack_change_no_bit(unit: str, row: Crossovers) -> None:
    """Forward and gradient, against the operations that are given the float32 factors themselves."""
    set_crossovers(row, unit)
    for tokens in (1, 8, 33, 300):
        inputs = wide(tokens)
        training = layer_inputs((9, 30, 14), tokens, 150, 203).experts()
        experts = PackedExperts(training.a, training.bt, training.ranks, training.scale)
        base = (inputs.weight, inputs.bias)
        own = (experts.a, experts.bt, experts.expert_of_row, inputs.gates, experts.scale)
        x = inputs.x.detach().requires_grad_()
        y = expert_lora(x, *base, experts, inputs.gates, impl="native")
        assert torch.equal(y, torch.ops.cram.packed_expert_lora(inputs.x, *base, *own))
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        no_z = y.new_empty(tokens, 0)
        wanted = torch.ops.cram.packed_expert_lora_backward(
            torch.ones_like(y), None, no_z, base[0], *own, experts.total_rank, *[0] * 3, True, *[False] * 3
        )
        assert torch.equal(dx, wanted[0])
        assert (experts._copied is not None) == rounds_factors() == (has_pairs() and unit != "lanes")


@pytest.mark.parametrize("unit", UNITS)
def test_an_idle_expert_in_a_group_of_rows_may_hold_nan(unit: str) -> None:
    """Its rows share a tile, and a pair, with rows of an expert in use."""
    set_crossovers(ALWAYS, unit)
    inputs = layer_inputs((3, 5, 4), 6, 64, 96, segment_count=2).to(BF16)
    gates = inputs.gates.clone()
    gates[:, 1] = 0
    clean, spoilt = inputs.experts().freeze(), inputs.experts().freeze()
    for storage in (spoilt.a, spoilt.bt):
        storage[3:8] = torch.nan
    expected, found = (
        expert_lora(inputs.x, inputs.weight, inputs.bias, pack, gates, impl="native")
        for pack in (clean, spoilt)
    )
    assert torch.equal(expected, found)


@pytest.mark.parametrize("unit", UNITS)
def test_own_base_gives_any_number_of_threads_the_same_bits(unit: str) -> None:
    set_crossovers(ALWAYS, unit)
    inputs, threads, runs = layer_inputs((9, 30), 300, 260, 520).to(BF16), torch.get_num_threads(), []
    for count in (1, 2, 5, 8):
        torch.set_num_threads(count)
        runs += [run_layer(inputs, "native"), run_layer(inputs, "native")]
    torch.set_num_threads(threads)
    # Only tiles have a gradient of the base; torch's depends on its threads.
    names = [name for name in runs[0] if name != "dx" or has_tiles(unit)]
    assert all(torch.equal(runs[0][name], run[name]) for run in runs for name in names)


def has_pairs() -> bool:
    """Whether this processor multiplies bfloat16, in pairs or tiles."""
    found = crossovers()
    return found is not None and found[0].unit in ("pairs", "tiles")


def has_tiles(unit: str) -> bool:
    """Whether the unit is that of tiles on this processor."""
    found = crossovers()
    return unit == "tiles" and found is not None and found[0].unit == "tiles"
