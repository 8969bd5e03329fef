"""Weights are known again in every precision, and other weights are noticed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cram.values import are_close, differing, some_values


def network() -> nn.Module:
    """A linear, a normalisation with saved and unsaved buffers, and a tied linear."""
    torch.manual_seed(0)
    found = nn.ModuleDict({"first": nn.Linear(64, 64), "norm": nn.BatchNorm1d(8), "tied": nn.Linear(64, 64)})
    found["tied"].weight = found["first"].weight
    found["norm"].register_buffer("made", torch.ones(3), persistent=False)
    return found


def test_every_floating_weight_that_is_saved_has_values() -> None:
    values = some_values(network(), 16, "model.")
    own = ["first.weight", "first.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"]
    assert sorted(values) == sorted(f"model.{name}" for name in (*own, "tied.weight", "tied.bias"))
    assert {len(each) for each in values.values()} == {8, 16}


def test_the_places_are_of_many_rows_and_many_columns() -> None:
    weight = nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        weight.weight.copy_(torch.arange(64 * 64).view(64, 64))
    places = [int(value) for value in some_values(weight, 16)["weight"]]
    assert len({place // 64 for place in places}) > 12 and len({place % 64 for place in places}) > 12


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_cast_changes_nothing_that_is_compared(dtype: torch.dtype) -> None:
    module = network()
    values = some_values(module, 16)
    assert differing(values, some_values(module.to(dtype), 16)) == []
    with torch.no_grad():
        module["norm"].running_var.add_(0.05)
    assert differing(values, some_values(module, 16)) == ["norm.running_var"]


def test_what_cannot_be_read_has_no_values() -> None:
    module = network()
    module["norm"].to("meta")
    module["first"].bias = nn.Parameter(torch.zeros(64, dtype=torch.int8), requires_grad=False)
    with torch.no_grad():
        module["tied"].bias.fill_(torch.nan)
    assert sorted(some_values(module, 4)) == ["first.weight", "tied.weight"]


def test_other_numbers_of_values_are_not_close() -> None:
    assert are_close([1.0, 0.0], [1.005, 1e-8]) and not are_close([1.0], [1.01]) and not are_close([], [1.0])
