"""expert_lora on Triton: values and gradients against a float64 oracle, on every device and precision."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cram_kernels import PackedExperts, dropout_mask, expert_lora, pack_experts
from cram_kernels.expert_lora import tiles
from cram_kernels.expert_lora.dropout import keep_scale
from cram_kernels.launch import architecture
from cram_kernels.testing import (
    GATINGS,
    LayerInputs,
    assert_within_budget,
    assert_within_rounding,
    layer_inputs,
    layer_oracle,
    layer_plain,
    poisoned_allocations,
    run_layer,
)
from tests.cram_kernels.devices import BF16, FP16, FP32, needs_interpreter, on_devices, quiet_numpy
from tests.cram_kernels.test_expert_lora import SHAPES, WRONG

pytestmark = quiet_numpy
RANKS = (4, 9, 5, 8)


def assert_budget(actual: dict[str, Tensor], inputs: LayerInputs) -> None:
    """Assert the budget for some or all of `run_layer`'s results."""
    plain, oracle = layer_plain(inputs), layer_oracle(inputs)
    assert_within_budget(actual, {k: plain[k] for k in actual}, {k: oracle[k] for k in actual})


def within_budget(inputs: LayerInputs) -> dict[str, Tensor]:
    actual = run_layer(inputs, "triton")
    assert_budget(actual, inputs)
    return actual


@on_devices()
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, device: str, dtype: torch.dtype) -> None:
    inputs = layer_inputs(**SHAPES[name]).to(dtype, device=device)
    with poisoned_allocations():
        actual = run_layer(inputs, "triton")
    assert set(actual) == set(layer_oracle(inputs))
    assert_within_rounding(actual, inputs)


@on_devices(cpu=(FP32,))
@pytest.mark.parametrize("trained", [0, 1, 3, 4])
@pytest.mark.parametrize("gating", GATINGS)
def test_trained_suffix_and_gating(gating: str, trained: int, device: str, dtype: torch.dtype) -> None:
    inputs = layer_inputs(gating=gating, trained=trained).to(dtype, device=device)
    assert_within_rounding(run_layer(inputs, "triton"), inputs)


@needs_interpreter
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    ranks=st.lists(st.integers(0, 20), max_size=6),
    blocks=st.integers(0, 9),
    segment_count=st.integers(1, 4),
    widths=st.tuples(st.integers(1, 100), st.integers(1, 100)),
    trained=st.integers(0, 6),
    gating=st.sampled_from(GATINGS),
    zero=st.booleans(),
    dtype=st.sampled_from([FP32, FP16]),
)
def test_any_shape(
    ranks: list[int],
    blocks: int,
    segment_count: int,
    widths: tuple[int, int],
    trained: int,
    gating: str,
    zero: bool,
    dtype: torch.dtype,
) -> None:
    inputs = layer_inputs(
        ranks, blocks * segment_count, *widths, gating=gating, segment_count=segment_count, trained=trained
    ).to(dtype)
    if zero:
        inputs = replace(inputs, gates=inputs.gates * (inputs.gates > 0.25))
    assert_within_rounding(run_layer(inputs, "triton"), inputs)


@on_devices()
@pytest.mark.parametrize("master", [False, True], ids=["same", "fp32-master"])
@pytest.mark.parametrize("gating", GATINGS)
def test_error_budget(gating: str, master: bool, device: str, dtype: torch.dtype) -> None:
    inputs = layer_inputs(RANKS, 96, 72, 104, gating=gating).to(dtype, FP32 if master else None, device)
    actual = within_budget(inputs)
    assert actual["y"].dtype == actual["dx"].dtype == dtype
    assert actual["da"].dtype == actual["db"].dtype == (FP32 if master else dtype)
    assert actual["dgates"].dtype == FP32


# The interpreter would take minutes.
LONG = [pytest.param(tokens, marks=pytest.mark.gpu) for tokens in (2049, 8193)]


# One T of every bucket of the tables, at widths that two or more programs share along K.
@on_devices(cpu=(FP16,))
@pytest.mark.parametrize("tokens", [1, 64, 65, 513, *LONG])
def test_split_sums(tokens: int, device: str, dtype: torch.dtype) -> None:
    """K in several float32 planes: gated and then summed by EXPAND in short inference calls, else by FOLD."""
    width = 1100
    out = 1048 if device == "cuda" or tokens in (1, 65) else 72
    inputs = layer_inputs(RANKS, tokens, width, out, gating="token").to(dtype, device=device)
    tile = tiles.shrink_tile(architecture(torch.device(device)), dtype, tokens, 32, width)
    assert (tile.split_k > 1) == (tokens <= 8192)
    actual = within_budget(inputs)
    with torch.no_grad():
        y = expert_lora(inputs.x, inputs.weight, inputs.bias, inputs.experts(), inputs.gates, impl="triton")
    # Up to 64 tokens planes are gated before they are added.
    assert_budget({"y": y}, inputs)
    assert tokens <= 64 or torch.equal(y, actual["y"])


@on_devices(cpu=(FP32,))
@pytest.mark.parametrize("tokens", [48, 160])
def test_many_trained_rows(tokens: int, device: str, dtype: torch.dtype) -> None:
    """Several row tiles and token slabs of the weight gradients, and several K blocks of EXPAND."""
    within_budget(layer_inputs((30, 40, 50), tokens, 72, 40, trained=2).to(dtype, device=device))


def others_off(inputs: LayerInputs) -> LayerInputs:
    """Leave each segment two experts: the gates of all others become exactly 0."""
    count = inputs.gates.shape[1]
    near = (torch.arange(count) - torch.arange(len(inputs.gates))[:, None]) % count < 2
    return replace(inputs, gates=inputs.gates * near.to(inputs.gates.device))


SKIPPED = [(40, 72, needs) for needs in ("nothing", "x", "trained", "everything")]


@on_devices(cpu=(FP16,))
@pytest.mark.parametrize(("tokens", "width", "needs"), [*SKIPPED, (200, 72, "x"), (40, 1100, "nothing")])
def test_skipped_rank_tiles(tokens: int, width: int, needs: str, device: str, dtype: torch.dtype) -> None:
    """R > 128 with experts of rank 64 that a segment does not use: what stays unwritten is never read."""
    inputs = layer_inputs((64, 32, 48, 64), tokens, width, 72).to(dtype, device=device)
    inputs = others_off(inputs)
    experts = inputs.experts() if needs in ("trained", "everything") else inputs.experts().freeze()
    x = inputs.x.clone().requires_grad_(needs in ("x", "everything"))
    gates = inputs.gates.clone().requires_grad_(needs == "everything")
    with poisoned_allocations():
        y = expert_lora(x, inputs.weight, inputs.bias, experts, gates, impl="triton")
        if y.requires_grad:
            y.backward(inputs.dy)
    leaves = {"dx": x, "dgates": gates, "da": experts.trained_a, "db": experts.trained_b}
    grads = {k: leaf.grad for k, leaf in leaves.items() if leaf is not None and leaf.grad is not None}
    assert_budget({"y": y.detach(), **grads}, inputs)


@on_devices(cpu=(FP16,))
@pytest.mark.parametrize("needs", ["x", "gates", "a", "b", "a b", "x a", "gates b", "none"])
def test_each_gradient_alone(needs: str, device: str, dtype: torch.dtype) -> None:
    """What does not require grad gets none, and the others do not change."""
    inputs = layer_inputs(trained=2).to(dtype, device=device)
    experts = inputs.experts()
    leaves = {"x": inputs.x.clone(), "gates": inputs.gates.clone()}
    leaves |= {"a": experts.trained_a, "b": experts.trained_b}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in needs.split())
    y = expert_lora(leaves["x"], inputs.weight, inputs.bias, experts, leaves["gates"], impl="triton")
    assert y.requires_grad == (needs != "none")
    if needs != "none":
        y.backward(inputs.dy)
    grads = {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert {name[1:] for name in grads} == set(needs.replace("none", "").split())
    assert_within_rounding({"y": y.detach(), **grads}, inputs)


@on_devices()
@pytest.mark.parametrize("layout", ["transposed", "every_second", "expanded", "padded_rows"])
def test_strided_input(layout: str, device: str, dtype: torch.dtype) -> None:
    inputs = layer_inputs(gating="map").to(dtype, device=device)

    def strided(t: Tensor) -> Tensor:
        layouts = {
            "transposed": t.t().contiguous().t(),
            "every_second": t.repeat_interleave(2, -1)[:, ::2],
            "expanded": t[:1].expand(len(t), -1),
            "padded_rows": torch.cat([t, torch.full_like(t, torch.nan)], 1)[:, : t.shape[1]],
        }
        assert not layouts[layout].is_contiguous()
        return layouts[layout]

    inputs = replace(inputs, x=strided(inputs.x), dy=strided(inputs.dy))
    inputs = replace(inputs, weight=strided(inputs.weight), bias=inputs.bias.repeat_interleave(2)[::2])
    assert_within_rounding(run_layer(inputs, "triton"), inputs)


@on_devices()
@pytest.mark.parametrize("what", ["gates", "gates_row", "segments", "a", "bt"])
def test_strided_small_tensors(what: str, device: str, dtype: torch.dtype) -> None:
    """Gates, maps and packed factors may be views of any layout too."""
    inputs = layer_inputs(gating="map" if what == "segments" else "segment", trained=0)
    inputs = inputs.to(dtype, device=device)
    experts = inputs.experts()
    gates, segments, a, bt = inputs.gates, inputs.segments, experts.a, experts.bt
    if what == "gates":
        gates = gates.t().contiguous().t()
    if what == "gates_row":
        inputs = replace(inputs, gates=gates[:1].expand(4, -1))
        gates = inputs.gates
    if segments is not None:
        segments = torch.stack([segments, torch.zeros_like(segments)], 1)[:, 0]
    a = a.t().contiguous().t() if what == "a" else a
    bt = bt.t().contiguous().t() if what == "bt" else bt
    packed = PackedExperts(a, bt, experts.ranks, experts.scale)
    x, gates = inputs.x.clone().requires_grad_(), gates.detach().requires_grad_()
    y = expert_lora(x, inputs.weight, inputs.bias, packed, gates, segments, impl="triton")
    y.backward(inputs.dy)
    assert_within_rounding({"y": y.detach(), "dx": x.grad, "dgates": gates.grad}, inputs)


@on_devices()
def test_leading_dimensions_and_int32_map(device: str, dtype: torch.dtype) -> None:
    """Even blocks of tokens written as a map; a row of gates that no token uses may hold NaN."""
    inputs = layer_inputs(trained=0).to(dtype, device=device)
    segments = torch.arange(4, dtype=torch.int32, device=device).repeat_interleave(6)
    gates = torch.cat([inputs.gates, torch.full_like(inputs.gates[:1], torch.nan)]).requires_grad_()
    arguments = (inputs.weight, None, inputs.experts(), gates, segments)
    y = expert_lora(inputs.x.view(2, 3, 4, 20), *arguments, impl="triton")
    assert y.shape == (2, 3, 4, 28)
    y.backward(inputs.dy.view(2, 3, 4, 28))
    assert (gates.grad[4] == 0).all()
    expected = replace(inputs, bias=torch.zeros_like(inputs.bias))
    assert_within_rounding({"y": y.detach().view(24, 28), "dgates": gates.grad[:4]}, expected)


@on_devices(cpu=(FP16,), cuda=(BF16, FP16))
def test_autocast_follows_linear(device: str, dtype: torch.dtype) -> None:
    inputs = layer_inputs(RANKS, 64, 40, 48).to(FP32, device=device)
    experts = inputs.experts()
    x, gates = inputs.x.clone().requires_grad_(), inputs.gates.clone().requires_grad_()
    with torch.autocast(device, dtype=dtype):
        y = expert_lora(x, inputs.weight, inputs.bias, experts, gates, impl="triton")
        assert y.dtype == dtype
        y.backward(inputs.dy.to(dtype))
    low = inputs.to(dtype, FP32)
    grads = {"dx": x.grad, "dgates": gates.grad, "da": experts.trained_a.grad, "db": experts.trained_b.grad}
    assert all(grad.dtype == FP32 for grad in grads.values())
    assert_budget({"y": y.detach(), **grads}, low)


@on_devices()
@pytest.mark.parametrize("seed", [2**40 + 3, -1])
@pytest.mark.parametrize(("tokens", "gating"), [(17, "token"), (72, "segment")])
def test_dropout_draws_the_mask(tokens: int, gating: str, seed: int, device: str, dtype: torch.dtype) -> None:
    """Forward, dX and dA draw `dropout_mask`, in every tile."""
    inputs = layer_inputs(RANKS, tokens, 150, 40, gating=gating).to(dtype, device=device)
    mask = dropout_mask(seed, *inputs.x.shape, 0.3, device)
    actual = run_layer(inputs, "triton", dropout=0.3, seed=seed)
    assert_within_rounding(actual, inputs, mask, keep_scale(0.3))
    with pytest.raises(AssertionError):
        assert_within_rounding(actual, inputs, mask.roll(1, 1), keep_scale(0.3))


@on_devices()
@pytest.mark.parametrize("name", WRONG)
def test_wrong_routing_is_caught(name: str, device: str, dtype: torch.dtype) -> None:
    inputs = layer_inputs(RANKS, 64, 32, 48)
    right, wrong = (each.to(dtype, device=device) for each in (inputs, WRONG[name](inputs)))
    with pytest.raises(AssertionError, match="error must be at most"):
        assert_within_budget(run_layer(wrong, "triton"), layer_plain(right), layer_oracle(right))


@on_devices()
def test_runs_are_bitwise_equal(device: str, dtype: torch.dtype) -> None:
    inputs = layer_inputs(RANKS, 160, 72, 56, gating="map").to(dtype, device=device)
    with poisoned_allocations():
        first, second = (run_layer(inputs, "triton", dropout=0.1, seed=3) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# numpy's products depend on a row's place in its block: segments are whole blocks under the interpreter.
BATCHES = {
    "decode": ({"cpu": 16, "cuda": 15}, RANKS, 1030),
    "decode_skipped": ({"cpu": 16, "cuda": 15}, (64, 48, 64), 72),
    "prefill": ({"cpu": 128, "cuda": 70}, RANKS, 72),
}


@on_devices(cpu=(FP16,))
@pytest.mark.parametrize("name", BATCHES)
def test_batch_equals_batches_of_one(name: str, device: str, dtype: torch.dtype) -> None:
    """Bitwise within one size bucket; the base linear, whose BLAS chooses by shape, is zero here."""
    lengths, ranks, width = BATCHES[name]
    each = lengths[device]
    inputs = layer_inputs(ranks, 4 * each, width, 40).to(dtype, device=device)
    inputs = others_off(replace(inputs, weight=torch.zeros_like(inputs.weight)))

    def run(part: LayerInputs) -> tuple[Tensor, ...]:
        results = run_layer(part, "triton")
        with torch.no_grad():
            y = expert_lora(part.x, part.weight, part.bias, part.experts(), part.gates, impl="triton")
        return y, results["y"], results["dx"], results["dgates"].repeat_interleave(each, 0)

    whole = run(inputs)
    for s in range(4):
        rows = slice(each * s, each * s + each)
        alone = run(replace(inputs, x=inputs.x[rows], dy=inputs.dy[rows], gates=inputs.gates[s : s + 1]))
        for one, all_of_them in zip(alone, whole, strict=True):
            assert torch.equal(one, all_of_them[rows])


@on_devices()
def test_result_may_be_changed_in_place(device: str, dtype: torch.dtype) -> None:
    """Backward reads none of what it returned."""
    inputs = layer_inputs().to(dtype, device=device)
    experts = inputs.experts()
    y = expert_lora(inputs.x, inputs.weight, inputs.bias, experts, inputs.gates, impl="triton")
    y.mul_(2).backward(inputs.dy / 2)
    assert_within_rounding({"da": experts.trained_a.grad, "db": experts.trained_b.grad}, inputs)


@on_devices(cpu=(FP32,), cuda=(FP32,))
def test_room_for_experts_does_nothing(device: str, dtype: torch.dtype) -> None:
    """A pack with room computes what the pack without computes, whatever the spare columns hold."""
    inputs = layer_inputs(trained=0).to(dtype, device=device)
    gates = torch.nn.functional.pad(inputs.gates, (0, 2), value=3.0)
    roomy = pack_experts(inputs.a, inputs.b, inputs.scale).reserve(40, 6)
    y = expert_lora(inputs.x, inputs.weight, inputs.bias, roomy, gates, impl="triton")
    assert_within_rounding({"y": y}, inputs)
