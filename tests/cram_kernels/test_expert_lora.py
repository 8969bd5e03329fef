"""expert_lora: values and gradients of both implementations against a float64 oracle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cram_kernels import centroid_gates, expert_lora, pack_experts, routed_expert_lora
from cram_kernels.testing import (
    GATINGS,
    LayerInputs,
    assert_within_budget,
    layer_inputs,
    layer_oracle,
    layer_plain,
    poisoned_allocations,
    run_layer,
)

IMPLS = ("reference", "cpu")
SHAPES: dict[str, dict[str, object]] = {
    "mixed_ranks": {"ranks": (4, 9, 1, 6)},
    "rank_zero_first": {"ranks": (0, 5)},
    "rank_zero_trained": {"ranks": (5, 0)},
    "all_ranks_zero": {"ranks": (0, 0)},
    "rank_one": {"ranks": (1,)},
    "rank_64": {"ranks": (9, 64)},
    "ten_experts": {"ranks": (4, 5, 6, 7, 8, 9, 4, 5, 6, 7)},
    "no_expert": {"ranks": ()},
    "no_token": {"tokens": 0},
    "no_token_no_segment": {"tokens": 0, "segment_count": 0},
    "one_token": {"tokens": 1, "segment_count": 1},
    "15_tokens": {"tokens": 15, "segment_count": 5},
    "16_tokens": {"tokens": 16, "segment_count": 4},
    "17_tokens": {"tokens": 17, "segment_count": 1},
    "wide": {"tokens": 64, "in_features": 192, "out_features": 96},
}


def exact(inputs: LayerInputs, impl: str) -> None:
    """Compare with the oracle in float64."""
    torch.testing.assert_close(run_layer(inputs, impl), layer_oracle(inputs), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, impl: str) -> None:
    with poisoned_allocations():
        exact(layer_inputs(dtype=torch.float64, **SHAPES[name]), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("trained", [0, 1, 3, 4])
@pytest.mark.parametrize("gating", GATINGS)
def test_trained_suffix_and_gating(gating: str, trained: int, impl: str) -> None:
    exact(layer_inputs(dtype=torch.float64, gating=gating, trained=trained), impl)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    ranks=st.lists(st.integers(0, 12), max_size=6),
    blocks=st.integers(0, 5),
    segment_count=st.integers(1, 4),
    widths=st.tuples(st.integers(1, 18), st.integers(1, 18)),
    trained=st.integers(0, 6),
    gating=st.sampled_from(GATINGS),
    zero=st.booleans(),
)
def test_any_shape(
    ranks: list[int],
    blocks: int,
    segment_count: int,
    widths: tuple[int, int],
    trained: int,
    gating: str,
    zero: bool,
) -> None:
    inputs = layer_inputs(
        ranks,
        blocks * segment_count,
        *widths,
        gating=gating,
        segment_count=segment_count,
        trained=trained,
        dtype=torch.float64,
    )
    if zero:
        inputs = replace(inputs, gates=inputs.gates * (inputs.gates > 0.25))
    for impl in IMPLS:
        exact(inputs, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("gating", GATINGS)
@pytest.mark.parametrize(
    ("dtype", "expert_dtype"),
    [
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
    ids=["fp32", "bf16", "fp16", "bf16-master", "fp16-master"],
)
def test_error_budget(dtype: torch.dtype, expert_dtype: torch.dtype | None, gating: str, impl: str) -> None:
    inputs = layer_inputs((4, 9, 5, 8), 256, 64, 96, gating=gating).to(dtype, expert_dtype)
    actual = run_layer(inputs, impl)
    assert actual["y"].dtype == actual["dx"].dtype == dtype
    assert actual["da"].dtype == actual["db"].dtype == (expert_dtype or dtype)
    assert actual["dgates"].dtype == torch.float32
    assert_within_budget(actual, layer_plain(inputs), layer_oracle(inputs))


def shifted_offsets(inputs: LayerInputs) -> LayerInputs:
    """Move the border between the first two experts by one row."""
    a, b = torch.cat(inputs.a), torch.cat(inputs.b, 1)
    ranks = [len(a_e) for a_e in inputs.a]
    ranks[0], ranks[1] = ranks[0] + 1, ranks[1] - 1
    return replace(inputs, a=a.split(ranks), b=b.split(ranks, 1))


def masked_rank(inputs: LayerInputs) -> LayerInputs:
    """Lose the last row of the trained expert."""
    last = inputs.a[-1].clone()
    last[-1] = 0
    return replace(inputs, a=(*inputs.a[:-1], last))


WRONG = {
    "offset": shifted_offsets,
    "rank_mask": masked_rank,
    "gate_order": lambda inputs: replace(inputs, gates=inputs.gates.roll(1, 1)),
    "segment_order": lambda inputs: replace(inputs, gates=inputs.gates.roll(1, 0)),
    "scale": lambda inputs: replace(inputs, scale=inputs.scale * 1.05),
    "one_gate": lambda inputs: replace(inputs, gates=inputs.gates * torch.tensor([1, 1, 1, 1.1])),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", WRONG)
def test_budget_catches_wrong_routing(name: str, dtype: torch.dtype) -> None:
    inputs = layer_inputs((4, 9, 5, 8), 64, 32, 48).to(dtype)
    with pytest.raises(AssertionError, match="error must be at most"):
        assert_within_budget(run_layer(WRONG[name](inputs), "cpu"), layer_plain(inputs), layer_oracle(inputs))


@pytest.mark.parametrize("impl", IMPLS)
def test_runs_are_bitwise_equal(impl: str) -> None:
    inputs = layer_inputs((4, 9, 5, 8), 96, 64, 48)
    first, second = (run_layer(inputs, impl, dropout=0.1, seed=3) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("impl", IMPLS)
def test_batch_equals_batches_of_one(impl: str) -> None:
    inputs = layer_inputs(dtype=torch.float64, tokens=24, segment_count=4)
    whole = run_layer(inputs, impl)
    for s in range(4):
        rows = slice(6 * s, 6 * s + 6)
        one = replace(inputs, x=inputs.x[rows], dy=inputs.dy[rows], gates=inputs.gates[s : s + 1])
        alone = run_layer(one, impl)
        torch.testing.assert_close(alone["y"], whole["y"][rows], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(alone["dx"], whole["dx"][rows], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(alone["dgates"], whole["dgates"][s : s + 1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_segments_may_be_any_map(impl: str) -> None:
    """Leading dimensions, int32 maps, unused segments, and even blocks written as a map agree."""
    inputs = layer_inputs(dtype=torch.float64, tokens=24, segment_count=4, trained=0)
    experts = inputs.experts()
    even = expert_lora(inputs.x, inputs.weight, inputs.bias, experts, inputs.gates, impl=impl)
    segments = torch.arange(4, dtype=torch.int32).repeat_interleave(6)
    extended = torch.cat([inputs.gates, torch.full((1, 4), torch.nan, dtype=torch.float64)])
    x = inputs.x.view(2, 3, 4, 20)
    exact(replace(inputs, segments=segments, trained=1), impl)
    mapped = expert_lora(x, inputs.weight, inputs.bias, experts, extended, segments, impl=impl)
    assert mapped.shape == (2, 3, 4, 28)
    torch.testing.assert_close(mapped.view(24, 28), even, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("stride", ["transposed", "every_second", "expanded"])
def test_strided_input(stride: str, impl: str) -> None:
    inputs = layer_inputs(dtype=torch.float64)
    layouts = {
        "transposed": inputs.x.t().contiguous().t(),
        "every_second": inputs.x.repeat_interleave(2, 1)[:, ::2],
        "expanded": inputs.x[:1].expand(24, -1),
    }
    strided = layouts[stride]
    assert not strided.is_contiguous()
    exact(replace(inputs, x=strided, dy=inputs.dy.t().contiguous().t()), impl)


@pytest.mark.parametrize("needs", ["x", "gates", "trained", "none"])
def test_each_gradient_alone(needs: str) -> None:
    """What does not require grad gets none, and the others do not change."""
    inputs = layer_inputs(dtype=torch.float64)
    oracle = layer_oracle(inputs)
    experts = inputs.experts() if needs == "trained" else inputs.experts().freeze()
    x = inputs.x.clone().requires_grad_(needs == "x")
    gates = inputs.gates.clone().requires_grad_(needs == "gates")
    y = expert_lora(x, inputs.weight, None, experts, gates, impl="cpu")
    assert y.requires_grad == (needs != "none")
    if needs == "none":
        return
    y.backward(inputs.dy)
    leaves = {"dx": x, "dgates": gates, "da": experts.trained_a, "db": experts.trained_b}
    for name, leaf in leaves.items():
        if leaf is not None and leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, oracle[name], rtol=1e-12, atol=1e-12)
    present = {name for name, leaf in leaves.items() if leaf is not None and leaf.grad is not None}
    assert present == {"x": {"dx"}, "gates": {"dgates"}, "trained": {"da", "db"}}[needs]


def test_reference_gradcheck() -> None:
    inputs = layer_inputs((2, 3), 4, 3, 4, segment_count=2, trained=2, dtype=torch.float64)
    gates = inputs.gates * torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    experts = inputs.experts()

    def layer(x: torch.Tensor, gates: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return expert_lora(x, inputs.weight, inputs.bias, experts, gates, dropout=0.3, impl="reference")

    leaves = (inputs.x.requires_grad_(), gates.requires_grad_(), experts.trained_a, experts.trained_b)
    assert torch.autograd.gradcheck(layer, leaves)
    assert torch.autograd.gradgradcheck(layer, leaves)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_reference_compiles_whole(dropout: float) -> None:
    inputs = layer_inputs(trained=2)
    experts = inputs.experts()

    def step(x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        return expert_lora(
            x, inputs.weight, inputs.bias, experts, gates, dropout=dropout, seed=5, impl="reference"
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        experts.zero_grad()
        x, gates = inputs.x.clone().requires_grad_(), inputs.gates.clone().requires_grad_()
        y = function(x, gates)
        y.backward(inputs.dy)
        results.append((y.detach(), x.grad, gates.grad, experts.trained_a.grad, experts.trained_b.grad))
    torch.testing.assert_close(*results)


# The compiler itself instantiates autograd.Function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("gating", GATINGS)
def test_packed_path_compiles_whole(gating: str) -> None:
    inputs = layer_inputs(gating=gating)
    experts = inputs.experts()
    gates = inputs.gates * (inputs.gates > 0.3)

    def step(x: torch.Tensor) -> torch.Tensor:
        return expert_lora(
            x * 2, inputs.weight, inputs.bias, experts, gates, inputs.segments, dropout=0.1, impl="cpu"
        ).tanh()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        experts.zero_grad()
        x = inputs.x.clone().requires_grad_()
        y = function(x)
        y.backward(inputs.dy)
        results.append((y.detach(), x.grad, experts.trained_a.grad, experts.trained_b.grad))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("impl", [*IMPLS, "auto"])
def test_routed_is_gates_then_layer(impl: str) -> None:
    inputs = layer_inputs(dtype=torch.float64)
    query, centroids = torch.randn(4, 8).double(), torch.randn(4, 8).double()
    members = torch.tensor([[True, True, False, True]]).expand(4, -1)
    experts = pack_experts(inputs.a, inputs.b, inputs.scale)
    y = routed_expert_lora(
        inputs.x, inputs.weight, inputs.bias, experts, query, centroids, 2.0, members, impl=impl
    )
    gates = centroid_gates(query, centroids[None], 2.0, members)[0]
    expected = layer_oracle(replace(inputs, gates=gates))["y"]
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"centroids must be \[E, D_q\]"):
        routed_expert_lora(inputs.x, inputs.weight, None, experts, query, centroids[None], 2.0)


# vmap calls an operation without a rule for batches once per gradient, and says so.
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("shared_a", [False, True])
@pytest.mark.parametrize("gating", GATINGS)
@pytest.mark.parametrize("impl", ["cpu", "native"])
def test_a_batch_of_gradients_is_gradient_after_gradient(impl: str, gating: str, shared_a: bool) -> None:
    inputs = layer_inputs((4, 4, 4, 4), gating=gating, shared_a=shared_a)
    experts, gates = inputs.experts(), inputs.gates.requires_grad_()
    leaves = (inputs.x.requires_grad_(), gates, experts.trained_a, experts.trained_b)

    def layer() -> torch.Tensor:
        return expert_lora(inputs.x, inputs.weight, None, experts, gates, inputs.segments, impl=impl)

    grads = torch.stack([inputs.dy, -2 * inputs.dy, inputs.dy.flip(0)])
    ones = [torch.autograd.grad(layer(), leaves, grad) for grad in grads]
    found = torch.autograd.grad(layer(), leaves, grads, is_grads_batched=True)
    torch.testing.assert_close(found, tuple(map(torch.stack, zip(*ones, strict=True))))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_runs_on_cuda_are_bitwise_equal() -> None:
    """Thousands of tokens of one segment, in an order that atomic sums would not keep."""
    inputs = layer_inputs((8, 8, 8, 8), 8192, gating="map")
    experts, gates = inputs.experts().cuda(), inputs.gates.cuda().requires_grad_()
    x, weight, segments = inputs.x.cuda(), inputs.weight.cuda(), inputs.segments.cuda()
    found = []
    for _ in range(5):
        y = expert_lora(x, weight, None, experts, gates, segments, impl="cpu")
        found.append(torch.autograd.grad(y, gates, inputs.dy.cuda())[0])
    assert all(torch.equal(each, found[0]) for each in found)
