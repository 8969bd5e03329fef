"""The native expert_lora: rounding, gating rules, what it saves, compilation, refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cram_kernels import (
    PackedExperts,
    dropout_mask,
    expert_lora,
    native_libraries,
    pack_experts,
    stacked_expert_lora,
)
from cram_kernels.expert_lora import api, native
from cram_kernels.expert_lora.dropout import keep_scale
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

_MISSING = native_libraries()["cpu"]
pytestmark = pytest.mark.skipif(_MISSING is not None, reason=str(_MISSING))

FP32, BF16 = torch.float32, torch.bfloat16
DTYPES: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "fp32": (FP32, None),
    "bf16": (BF16, None),
    "bf16-master": (BF16, FP32),
    "fp32-half": (FP32, BF16),
    "bf16-fp16": (BF16, torch.float16),
}
# Widths and tokens around the sizes of vectors, panels and blocks; ragged ends everywhere.
SHAPES: dict[str, dict[str, Any]] = {
    "mixed_ranks": {},
    "rank_zero_first": {"ranks": (0, 5)},
    "rank_zero_trained": {"ranks": (5, 0)},
    "all_ranks_zero": {"ranks": (0, 0)},
    "rank_one": {"ranks": (1,)},
    "long_pack": {"ranks": (9, 64, 200), "tokens": 24},
    "no_expert": {"ranks": ()},
    "no_token": {"tokens": 0},
    "no_token_no_segment": {"tokens": 0, "segment_count": 0},
    "one_token": {"tokens": 1, "segment_count": 1, "in_features": 257, "out_features": 1111},
    "one_panel": {"tokens": 7, "segment_count": 7, "in_features": 33, "out_features": 95},
    "few_at_most": {"tokens": 64, "segment_count": 4, "in_features": 160, "out_features": 300},
    "few_halves_at_most": {"tokens": 32, "segment_count": 1, "in_features": 97, "out_features": 129},
    "blocks": {"tokens": 65, "segment_count": 5, "in_features": 129, "out_features": 1100},
    "long": {"tokens": 602, "segment_count": 7, "in_features": 130, "out_features": 600},
}


def rounding(inputs: LayerInputs, dropout: float = 0.0) -> None:
    """Run the layer, its memory poisoned, and bound each element's error by what rounding may cost."""
    with poisoned_allocations():
        found = run_layer(inputs, "native", dropout=dropout, seed=11)
    if inputs.x.dtype == FP32 and inputs.a and inputs.a[0].dtype != FP32:
        found = {
            name: found[name] for name in ("y", "dx", "dgates")
        }  # the others round to bfloat16 at the end
    keep = dropout_mask(11, *inputs.x.shape, dropout) if dropout else None
    assert_within_rounding(found, inputs, keep, keep_scale(dropout) if dropout else 1.0)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, kind: str) -> None:
    rounding(layer_inputs(**SHAPES[name]).to(*DTYPES[kind]))


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("trained", [0, 1, 4])
@pytest.mark.parametrize("gating", GATINGS)
def test_trained_suffix_gating_and_dropout(gating: str, trained: int, dropout: float, kind: str) -> None:
    rounding(layer_inputs(gating=gating, trained=trained, in_features=37).to(*DTYPES[kind]), dropout)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "bf16-master"])
def test_dropout_over_many_blocks(kind: str) -> None:
    rounding(layer_inputs((4, 9), 602, 1030, 600, segment_count=7).to(*DTYPES[kind]), 0.3)


@pytest.mark.parametrize("gating", GATINGS)
@pytest.mark.parametrize("kind", ["fp32", "bf16", "bf16-master"])
def test_error_budget(kind: str, gating: str) -> None:
    inputs = layer_inputs((4, 9, 5, 8), 256, 64, 96, gating=gating).to(*DTYPES[kind])
    actual = run_layer(inputs, "native")
    dtype, expert_dtype = DTYPES[kind]
    assert actual["y"].dtype == actual["dx"].dtype == dtype
    assert actual["da"].dtype == actual["db"].dtype == (expert_dtype or dtype)
    assert actual["dgates"].dtype == FP32
    assert_within_budget(actual, layer_plain(inputs), layer_oracle(inputs))


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_error_budget_of_a_wide_base(kind: str) -> None:
    """The weight is more than a block of what is widened where torch has no fast bfloat16 product."""
    inputs = layer_inputs((4,), 66, 2100, 2100, segment_count=1).to(*DTYPES[kind])
    assert_within_budget(run_layer(inputs, "native"), layer_plain(inputs), layer_oracle(inputs))


def test_budget_catches_wrong_routing() -> None:
    inputs = layer_inputs((4, 9, 5, 8), 64, 32, 48).to(BF16)
    wrong = replace(inputs, gates=inputs.gates.roll(1, 0))
    with pytest.raises(AssertionError, match="error must be at most"):
        assert_within_budget(run_layer(wrong, "native"), layer_plain(inputs), layer_oracle(inputs))


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_experts_add_the_same_bits_in_any_batch(kind: str) -> None:
    """Over a base of zeros: a batch equals its tokens one by one, under one thread and under two."""
    inputs = layer_inputs((4, 9, 1, 6), 70, 300, 1111, gating="token").to(*DTYPES[kind])
    experts, zero = inputs.experts().freeze(), torch.zeros_like(inputs.weight)
    whole = expert_lora(inputs.x, zero, None, experts, inputs.gates, impl="native")
    for t in range(0, 70, 23):
        rows = slice(t, t + 1)
        one = expert_lora(inputs.x[rows], zero, None, experts, inputs.gates[rows], impl="native")
        assert torch.equal(one, whole[rows])
    threads = torch.get_num_threads()
    runs = []
    for count in (1, 2):
        torch.set_num_threads(count)
        runs.append(run_layer(replace(inputs, weight=zero), "native", dropout=0.1, seed=3))
    torch.set_num_threads(threads)
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_dropout_draws_the_documented_mask() -> None:
    """The native mask, seen through an identity: bit by bit that of `dropout_mask`, for several seeds."""
    width = 516
    experts = pack_experts([torch.eye(width)], [torch.eye(width)], 1.0)
    x, zero, gates = torch.ones(40, width), torch.zeros(width, width), torch.ones(1, 1)
    for seed in (0, 7, 2**40 + 3, -1):
        y = expert_lora(x, zero, None, experts, gates, dropout=0.25, seed=seed, impl="native")
        assert torch.equal(y != 0, dropout_mask(seed, 40, width, 0.25))


@pytest.mark.parametrize("stride", ["transposed", "every_second", "expanded", "unaligned"])
def test_strided_input(stride: str) -> None:
    inputs = layer_inputs()
    flat = torch.cat([inputs.x.flatten()[:1], inputs.x.flatten()])
    layouts = {
        "transposed": inputs.x.t().contiguous().t(),
        "every_second": inputs.x.repeat_interleave(2, 1)[:, ::2],
        "expanded": inputs.x[:1].expand(24, -1),
        "unaligned": flat[1:].view(24, 20),
    }
    gates = inputs.gates.repeat_interleave(2, 1)[:, ::2]
    rounding(replace(inputs, x=layouts[stride], dy=inputs.dy.t().contiguous().t(), gates=gates))


def test_leading_dimensions() -> None:
    inputs = layer_inputs(trained=0)
    arguments = inputs.weight, inputs.bias, inputs.experts(), inputs.gates
    flat = expert_lora(inputs.x, *arguments, impl="native")
    deep = expert_lora(inputs.x.view(2, 3, 4, 20), *arguments, impl="native")
    assert deep.shape == (2, 3, 4, 28)
    torch.testing.assert_close(deep.view(24, 28), flat)
    row = expert_lora(inputs.x[0], *arguments[:3], inputs.gates[:1], impl="native")
    torch.testing.assert_close(row, flat[0])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("gating", GATINGS)
def test_segments_stay_apart(gating: str, kind: str, bad: float) -> None:
    """Rows of a poisoned segment reach no other row, and no weight gradient where their gate is zero."""
    inputs = layer_inputs(gating=gating).to(*DTYPES[kind])
    tokens = torch.arange(24) // 6
    poisoned = inputs.segments == 1 if gating == "map" else tokens == 1
    gates = inputs.gates.clone()
    gates[tokens == 1 if gating == "token" else 1, 3] = 0
    clean = replace(inputs, gates=gates, dy=inputs.dy.masked_fill(poisoned[:, None], 0))
    expected = run_layer(clean, "native")
    found = run_layer(replace(clean, x=inputs.x.masked_fill(poisoned[:, None], bad)), "native")
    for name in ("y", "dx"):
        assert torch.equal(found[name][~poisoned], expected[name][~poisoned])
    assert_within_rounding({name: found[name] for name in ("da", "db")}, clean)


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("part", ["a", "b"])
@pytest.mark.parametrize("mode", ["inference", "training", "gate_gradient"])
@pytest.mark.parametrize("trained", [1, 3])
def test_unused_expert_may_hold_nan(trained: int, mode: str, part: str, kind: str) -> None:
    """The unused expert leaves an odd number of rows, so that a pair lacks its second half."""
    inputs = layer_inputs((4, 9, 1, 6), trained=trained).to(*DTYPES[kind])
    inputs = replace(inputs, gates=inputs.gates * torch.tensor([1, 0, 1, 1]))
    factors = list(getattr(inputs, part))
    factors[1] = torch.full_like(factors[1], torch.nan)
    experts = replace(inputs, **{part: tuple(factors)}).experts()
    gates = inputs.gates.clone().requires_grad_(mode == "gate_gradient")
    x = inputs.x.clone().requires_grad_()
    with torch.set_grad_enabled(mode != "inference"):
        y = expert_lora(x, inputs.weight, inputs.bias, experts, gates, impl="native")
    results = {"y": y.detach()}
    if mode != "inference":
        y.backward(inputs.dy)
        results |= {"dx": x.grad, "da": experts.trained_a.grad, "db": experts.trained_b.grad}
    assert_within_rounding(results, inputs)
    if mode == "gate_gradient":
        used = [0, 2, 3]
        assert gates.grad.isfinite().all()
        oracle = layer_oracle(inputs)["dgates"][:, used]
        tolerance = {"fp32": 1e-5, "bf16": 0.02}[kind] * float(oracle.abs().max())
        torch.testing.assert_close(gates.grad[:, used].double(), oracle, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_gate_of_zero_selects(kind: str) -> None:
    """An expert that one segment uses may hold NaN in A without reaching the outputs of the others."""
    inputs = layer_inputs().to(*DTYPES[kind])
    gates = inputs.gates.clone()
    gates[1:, 1] = 0
    a = (inputs.a[0], torch.full_like(inputs.a[1], torch.nan), *inputs.a[2:])
    found = run_layer(replace(inputs, a=a, gates=gates), "native")["y"]
    assert found[:6].isnan().all()
    assert_within_rounding(
        {"y": found[6:]}, replace(inputs, x=inputs.x[6:], dy=inputs.dy[6:], gates=gates[1:])
    )


@pytest.mark.parametrize("needs", ["x", "gates", "trained", "none"])
def test_each_gradient_alone(needs: str) -> None:
    """What does not require grad gets none, and the others do not change."""
    inputs = layer_inputs()
    experts = inputs.experts() if needs == "trained" else inputs.experts().freeze()
    x = inputs.x.clone().requires_grad_(needs == "x")
    gates = inputs.gates.clone().requires_grad_(needs == "gates")
    y = expert_lora(x, inputs.weight, inputs.bias, experts, gates, impl="native")
    assert y.requires_grad == (needs != "none")
    if needs == "none":
        return
    y.backward(inputs.dy)
    leaves = {"dx": x, "dgates": gates, "da": experts.trained_a, "db": experts.trained_b}
    found = {name: leaf.grad for name, leaf in leaves.items() if leaf is not None and leaf.grad is not None}
    assert set(found) == {"x": {"dx"}, "gates": {"dgates"}, "trained": {"da", "db"}}[needs]
    assert_within_rounding(found, inputs)


def saved_bytes(inputs: LayerInputs, experts: PackedExperts, gates: Tensor) -> int:
    """Bytes saved for backward beyond the arguments, each storage counted once."""
    living = (inputs.x, inputs.weight, inputs.bias, experts.a, experts.bt)
    known = {tensor.untyped_storage().data_ptr() for tensor in living}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        expert_lora(inputs.x, inputs.weight, inputs.bias, experts, gates, impl="native").sum().backward()
    return sum(found.values())


@pytest.mark.parametrize("kind", ["bf16", "bf16-master"])
@pytest.mark.parametrize("gates_need_grad", [False, True])
def test_saved_bytes(gates_need_grad: bool, kind: str) -> None:
    """Z of all rows for the gates' gradient, else of the trained ones; nothing of activation size."""
    ranks, tokens = (4, 5, 6, 9), 256
    inputs = layer_inputs(ranks, tokens, 512, 512, segment_count=8).to(*DTYPES[kind])
    inputs.x.requires_grad_()
    gates = inputs.gates.clone().requires_grad_(gates_need_grad)
    columns = sum(ranks) if gates_need_grad else ranks[-1]
    assert saved_bytes(inputs, inputs.experts(), gates) <= tokens * columns * 2 + 1024
    assert saved_bytes(inputs, inputs.experts().freeze(), inputs.gates) <= 1024


def test_autocast_follows_linear() -> None:
    inputs = layer_inputs((4, 9, 5), 64, 32, 48)
    experts = inputs.experts()
    x, gates = inputs.x.clone().requires_grad_(), inputs.gates.clone().requires_grad_()
    with torch.autocast("cpu", dtype=BF16):
        y = expert_lora(x, inputs.weight, inputs.bias, experts, gates, impl="native")
        assert y.dtype == BF16
        y.backward(inputs.dy.bfloat16())
    low = inputs.to(BF16, FP32)
    grads = {"dx": x.grad, "dgates": gates.grad, "da": experts.trained_a.grad, "db": experts.trained_b.grad}
    assert all(grad.dtype == FP32 for grad in grads.values())
    assert_within_budget({"y": y.detach(), **grads}, layer_plain(low), layer_oracle(low))


def test_second_backward_and_changed_weights_raise() -> None:
    inputs = layer_inputs()
    x = inputs.x.requires_grad_()
    experts = inputs.experts()

    def layer() -> Tensor:
        return expert_lora(x, inputs.weight, inputs.bias, experts, inputs.gates, impl="native")

    (dx,) = torch.autograd.grad(layer().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="must be differentiated once"):
        dx.sum().backward()
    y = layer()
    with torch.no_grad():
        experts.trained_a.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("index", [4, -1])
def test_segments_out_of_range(index: int) -> None:
    inputs = layer_inputs()
    segments = torch.zeros(24, dtype=torch.int64)
    segments[5] = index
    with pytest.raises(ValueError, match=r"segments must lie in \[0, 4\), got values"):
        expert_lora(inputs.x, inputs.weight, None, inputs.experts(), inputs.gates, segments, impl="native")


def test_stack_is_layer_after_layer() -> None:
    one, two = layer_inputs(trained=0), layer_inputs((2, 0, 3, 7), out_features=40, trained=0, seed=1)
    layers = [(each.weight, each.bias, each.experts()) for each in (one, two)]
    stacked = stacked_expert_lora(one.x, layers, one.gates, impl="native")
    for y, layer in zip(stacked, layers, strict=True):
        assert torch.equal(y, expert_lora(one.x, *layer, one.gates, impl="native"))


# The compiler itself instantiates autograd.Function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("gating", GATINGS)
def test_compiles_whole(gating: str) -> None:
    inputs = layer_inputs(gating=gating)
    experts = inputs.experts()

    def step(x: Tensor, seed: int | Tensor) -> Tensor:
        arguments = inputs.weight, inputs.bias, experts, inputs.gates, inputs.segments
        return expert_lora(x * 2, *arguments, dropout=0.1, seed=seed, impl="native").tanh()

    torch.compiler.reset()  # variants of the same code count against one limit
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for seed in (3, 4, 5, torch.tensor(3), torch.tensor(6)):
        results = []
        for function in (step, compiled):
            experts.zero_grad()
            x = inputs.x.clone().requires_grad_()
            y = function(x, seed)
            y.backward(inputs.dy)
            results.append((y.detach(), x.grad, experts.trained_a.grad, experts.trained_b.grad))
        torch.testing.assert_close(*results)
    with torch.no_grad():
        for seed in (3, torch.tensor(4)):
            torch.testing.assert_close(compiled(inputs.x, seed), step(inputs.x, seed))


def test_operations_pass_opcheck() -> None:
    inputs = layer_inputs((4, 9, 1), segment_count=2)
    experts, ops = inputs.experts(), torch.ops.cram
    base = inputs.x.view(2, 12, 20), inputs.weight, inputs.bias
    factors = experts.a, experts.bt, experts.expert_of_row, inputs.gates, 2.0
    torch.library.opcheck(ops.packed_expert_lora.default, (*base, *factors))
    for first in (0, 13, 14):
        torch.library.opcheck(ops.packed_expert_lora_forward.default, (*base, *factors, first, 99, 5, 7))
        torch.library.opcheck(
            ops.packed_expert_lora_forward.seeded, (*base, *factors, first, 99, torch.tensor(5))
        )
    lists = [inputs.weight] * 2, [inputs.bias] * 2, [experts.a] * 2, [experts.bt] * 2, [factors[2]] * 2
    torch.library.opcheck(ops.packed_expert_lora_stack.default, (base[0], *lists, *factors[3:]))
    z = inputs.x.new_ones(24, 14)
    needs = [(True, True, True, True), (True, False, False, False), (False, False, True, True)]
    for need in needs:
        arguments = (inputs.dy, inputs.x, z, inputs.weight, *factors, 13, 99)
        torch.library.opcheck(ops.packed_expert_lora_backward.default, (*arguments, 5, 7, *need))
        torch.library.opcheck(ops.packed_expert_lora_backward.seeded, (*arguments, torch.tensor(5), *need))


def test_who_is_served() -> None:
    """Auto takes it for float32 and bfloat16 on a CPU and goes on to the next one otherwise."""
    cpu = torch.device("cpu")
    for dtype in (FP32, BF16):
        assert api.OP.select("auto", cpu, dtype) is native.expert_lora
    for dtype in (torch.float64, torch.float16):
        assert api.OP.select("auto", cpu, dtype) is api.OP.impls["cpu"]
        with pytest.raises(NotImplementedError, match="dtype must be one of"):
            api.OP.select("native", cpu, dtype)
    with pytest.raises(NotImplementedError, match="must be on a CPU device, got cuda"):
        api.OP.select("native", torch.device("cuda"), FP32)
