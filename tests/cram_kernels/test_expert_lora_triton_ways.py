"""Other ways through the layer on Triton: base products in one launch with SHRINK; [x | U] [W | B]."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cram_kernels import stacked_expert_lora
from cram_kernels.expert_lora import tiles
from cram_kernels.testing import (
    GATINGS,
    LayerInputs,
    assert_within_budget,
    assert_within_rounding,
    layer_inputs,
    layer_oracle,
    layer_plain,
    poisoned_allocations,
)
from tests.cram_kernels.devices import BF16, FP16, on_devices, quiet_numpy

pytestmark = quiet_numpy
wide = pytest.importorskip("cram_kernels.expert_lora.wide", exc_type=ImportError)
decode = pytest.importorskip("cram_kernels.expert_lora.decode", exc_type=ImportError)
RANKS = ((4, 9, 5, 8), (1, 0, 3, 30), (40, 40, 40, 40))
OUT = (72, 40, 66)
# Rows of `tiles.STREAM`: one plane, and several.
ROWS: dict[str, tiles.StreamRow] = {"split": (64, 16, 64, 256, 2, 4, 3), "whole": (64, 32, 32, 512, 1, 4, 3)}


@pytest.fixture(params=ROWS)
def streamed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Turn the way on; return the kernels that were described since."""
    seen: list[str] = []
    original = decode.join
    monkeypatch.setattr(
        tiles, "stream_tile", lambda arch, dtype, tokens, width: tiles.streamed(ROWS[request.param], width)
    )
    monkeypatch.setattr(decode, "join", lambda *a, **k: seen.append("_join") or original(*a, **k))
    return seen


def three(tokens: int, gating: str, dtype: torch.dtype, device: str) -> list[LayerInputs]:
    """Inputs of layers that share x, gates and segments."""
    made = [
        layer_inputs(ranks, tokens, 1100, out, gating=gating, trained=0, seed=p).to(dtype, device=device)
        for p, (ranks, out) in enumerate(zip(RANKS, OUT, strict=True))
    ]
    return [replace(one, x=made[0].x, gates=made[0].gates, segments=made[0].segments) for one in made]


def run(parts: list[LayerInputs], with_bias: bool = True) -> tuple[Tensor, ...]:
    layers = [(one.weight, one.bias if with_bias else None, one.experts()) for one in parts]
    with torch.no_grad(), poisoned_allocations():
        return stacked_expert_lora(parts[0].x, layers, parts[0].gates, parts[0].segments, impl="triton")


def assert_budget(y: Tensor, inputs: LayerInputs) -> None:
    assert_within_budget({"y": y}, {"y": layer_plain(inputs)["y"]}, {"y": layer_oracle(inputs)["y"]})


@on_devices(cpu=(FP16,))
@pytest.mark.parametrize(("count", "gating"), [(1, "token"), (1, "segment"), (3, "map")])
def test_base_products_in_one_launch_with_shrink(
    count: int, gating: str, device: str, dtype: torch.dtype, streamed: list[str]
) -> None:
    """Projections of other widths and ranks, one of them wider than a step of JOIN; with and without bias."""
    parts = three(20, gating, dtype, device)[:count]
    for y, one in zip(run(parts), parts, strict=True):
        assert_budget(y, one)
    bare = [replace(one, bias=torch.zeros_like(one.bias)) for one in parts]
    for y, one in zip(run(parts, with_bias=False), bare, strict=True):
        assert_budget(y, one)
    assert streamed == ["_join"] * 2


@on_devices(cpu=(FP16,), cuda=(BF16,))
def test_what_one_launch_cannot_take_goes_to_the_library(
    device: str, dtype: torch.dtype, streamed: list[str]
) -> None:
    """A weight that is not stored row by row; one bias of two."""
    one, two, _ = three(3, "token", dtype, device)
    turned = replace(one, weight=one.weight.t().contiguous().t())
    (y,) = run([turned])
    assert_budget(y, one)
    layers = [(one.weight, one.bias, one.experts()), (two.weight, None, two.experts())]
    with torch.no_grad():
        ys = stacked_expert_lora(one.x, layers, one.gates, one.segments, impl="triton")
    for y, part in zip(ys, (one, replace(two, bias=torch.zeros_like(two.bias))), strict=True):
        assert_budget(y, part)
    assert not streamed


@on_devices(cpu=(FP16,), cuda=(BF16,))
def test_streamed_rows_do_not_depend_on_their_neighbours(
    device: str, dtype: torch.dtype, streamed: list[str]
) -> None:
    parts = three(5, "token", dtype, device)[:1]
    (y,) = run(parts)
    for row in range(5):
        alone = replace(parts[0], x=parts[0].x[row : row + 1], gates=parts[0].gates[row : row + 1])
        assert torch.equal(run([alone])[0], y[row : row + 1])


@on_devices(cpu=(FP16,), cuda=(BF16,))
def test_streamed_unused_expert_may_hold_nan(device: str, dtype: torch.dtype, streamed: list[str]) -> None:
    one = three(4, "segment", dtype, device)[0]
    gates = one.gates.clone()
    gates[:, 1] = 0.0
    expected = run([replace(one, gates=gates)])
    bad = tuple(torch.full_like(a, float("nan")) if e == 1 else a for e, a in enumerate(one.a))
    bad_b = tuple(torch.full_like(b, float("nan")) if e == 1 else b for e, b in enumerate(one.b))
    assert torch.equal(run([replace(one, gates=gates, a=bad, b=bad_b)])[0], expected[0])


def run_wide(inputs: LayerInputs) -> Tensor:
    experts = inputs.experts()
    rows = F.pad(inputs.x, (0, wide.room(experts)), value=float("nan"))
    weight = wide.widened(inputs.weight, experts)
    with poisoned_allocations():
        return wide.wide_expert_lora(rows, weight, inputs.bias, experts, inputs.gates, inputs.segments)


@on_devices(cpu=(FP16,))
@pytest.mark.parametrize("gating", GATINGS)
@pytest.mark.parametrize("ranks", RANKS)
def test_one_product_over_x_and_u(
    ranks: tuple[int, ...], gating: str, device: str, dtype: torch.dtype
) -> None:
    """Whatever lies behind x is overwritten."""
    inputs = layer_inputs(ranks, 72, 1100, 40, gating=gating, trained=0).to(dtype, device=device)
    assert_within_rounding({"y": run_wide(inputs)}, inputs)


def test_one_product_refuses_other_widths() -> None:
    inputs = layer_inputs(trained=0)
    experts = inputs.experts()
    rows = F.pad(inputs.x, (0, wide.room(experts)))
    weight = wide.widened(inputs.weight, experts)
    with pytest.raises(ValueError, match="rows and weight must be 52 wide.* got 20 and 52"):
        wide.wide_expert_lora(inputs.x, weight, None, experts, inputs.gates)
    with pytest.raises(ValueError, match="got 52 and 20"):
        wide.wide_expert_lora(rows, inputs.weight, None, experts, inputs.gates)
    empty = layer_inputs((0, 0)).experts()
    with pytest.raises(ValueError, match="at least one packed row"):
        wide.wide_expert_lora(inputs.x, inputs.weight, None, empty, inputs.gates[:, :2])
