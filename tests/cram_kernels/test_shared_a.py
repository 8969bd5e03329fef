"""Experts that share one A: the pack, and values and gradients of the layer against a float64 oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cram_kernels import (
    PackedExperts,
    dropout_mask,
    expert_lora,
    pack_experts,
    routed_expert_lora,
    stacked_expert_lora,
)
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

IMPLS = ("reference", "cpu")
RANKS = (5, 5, 5, 5)


def shared(ranks: tuple[int, ...] = RANKS, *sizes: int, **options: object) -> LayerInputs:
    return layer_inputs(ranks, *sizes, shared_a=True, **({"dtype": torch.float64} | options))


def exact(inputs: LayerInputs, impl: str) -> None:
    torch.testing.assert_close(run_layer(inputs, impl), layer_oracle(inputs), rtol=1e-11, atol=1e-12)


def pack(trained: int = 1) -> PackedExperts:
    return shared(trained=trained, dtype=torch.float32).experts()


def test_one_a_is_held_and_trained_whole() -> None:
    inputs = shared(trained=2)
    experts = inputs.experts()
    assert experts.a.shape == (5, 20) and experts.bt.shape == (20, 28) and experts.ranks == RANKS
    assert (experts.total_rank, experts.trained_rank, experts.gate_columns) == (20, 10, 4)
    assert experts.expert_of_row.tolist() == [e for e in range(4) for _ in range(5)]
    assert experts.trained_a.data_ptr() == experts.a.data_ptr() and experts.trained_a.shape == (5, 20)
    assert experts.trained_b.data_ptr() == experts.bt[10:].data_ptr() and experts.trained_b.shape == (10, 28)
    for e in range(4):
        a, b = experts.expert(e)
        assert torch.equal(a, inputs.a[0]) and torch.equal(b, inputs.b[e])
        assert a is experts.trained_a and b.requires_grad == (e >= 2)
    frozen = experts.freeze()
    assert frozen.shared_a and not list(frozen.parameters()) and frozen.expert(3)[0] is frozen.a
    assert frozen.a.data_ptr() == experts.a.data_ptr() and "shared_a=True" in repr(frozen)


def test_any_equal_a_may_be_given() -> None:
    """A pack read from files has one tensor a branch; views of one pack make the next."""
    inputs = shared()
    again = pack_experts([a.clone() for a in inputs.a], inputs.b, 2.0, 1, shared_a=True)
    assert torch.equal(again.a, inputs.a[0])
    views = [again.expert(e) for e in (2, 0, 1, 3)]
    moved = pack_experts([a for a, _ in views], [b for _, b in views], 2.0, 1, shared_a=True)
    assert torch.equal(moved.expert(0)[1], inputs.b[2]) and moved.a.data_ptr() != again.a.data_ptr()


def reload(experts: PackedExperts) -> PackedExperts:
    fresh = pack_experts([torch.zeros(5, 20)] * 4, [torch.zeros(28, 5)] * 4, 2.0, 1, shared_a=True)
    assert set(experts.state_dict()) == {"a", "bt"}
    fresh.load_state_dict(experts.state_dict())
    return fresh


@pytest.mark.parametrize("replaced", [lambda e: e.to(torch.float64), copy.deepcopy, reload])
def test_alias_survives(replaced: Callable[[PackedExperts], PackedExperts]) -> None:
    experts = pack(trained=1)
    values = experts.a.clone()
    found = replaced(experts)
    torch.testing.assert_close(found.a, values.to(found.a.dtype))
    (found.trained_a.sum() + found.trained_b.sum()).backward()
    before = found.bt.clone()
    torch.optim.SGD(found.parameters(), lr=1.0).step()
    torch.testing.assert_close(found.a, values.to(found.a.dtype) - 1)
    torch.testing.assert_close(found.bt, before - torch.tensor([0.0] * 15 + [1.0] * 5)[:, None])


A, B = torch.zeros(2, 6), torch.zeros(5, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pack_experts([A, A + 1], [B, B], 2.0, shared_a=True), r"a must be one matrix .* at \[1\]"),
        (lambda: pack_experts([A, A[:1]], [B, B[:, :1]], 2.0, shared_a=True), r"one matrix .* at \[1\]"),
        (
            lambda: PackedExperts(A, B.t(), (1, 1), 2.0, shared_a=True),
            r"its rank 2 and no room, got .*\(1, 1\)",
        ),
        (lambda: PackedExperts(A, B.t(), (), 2.0, shared_a=True), r"its rank 2 and no room, got ranks \(\)"),
        (lambda: PackedExperts(A, B.t(), (2,), 2.0, 0, 2, True), "no room, got .* gate_columns 2"),
        (lambda: PackedExperts(A, B.t(), (2, 2), 2.0, shared_a=True), r"sum to 2, got \(2, 2\)"),
        (lambda: pack().append(A, B), "append must not be called on experts with a shared A"),
        (lambda: pack().reserve(64, 8), "reserve must not be called on experts with a shared A"),
        (lambda: pack(0).insert(torch.zeros(5, 20), torch.zeros(28, 5)), "must find room"),
    ],
)
def test_refusals(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


SHAPES: dict[str, dict[str, object]] = {
    "one_branch": {"ranks": (5,)},
    "rank_zero": {"ranks": (0, 0, 0)},
    "rank_one": {"ranks": (1, 1)},
    "wider_than_input": {"ranks": (24, 24)},
    "no_token": {"tokens": 0},
    "one_token": {"tokens": 1, "segment_count": 1},
    "17_tokens": {"tokens": 17, "segment_count": 1},
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, impl: str) -> None:
    with poisoned_allocations():
        exact(shared(**SHAPES[name]), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("trained", [0, 1, 3, 4])
@pytest.mark.parametrize("gating", GATINGS)
def test_trained_branches_and_gating(gating: str, trained: int, impl: str) -> None:
    exact(shared(gating=gating, trained=trained), impl)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rank=st.integers(0, 7),
    branches=st.integers(1, 5),
    blocks=st.integers(0, 4),
    widths=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    trained=st.integers(0, 5),
    gating=st.sampled_from(GATINGS),
    zero=st.booleans(),
)
def test_any_shape(
    rank: int, branches: int, blocks: int, widths: tuple[int, int], trained: int, gating: str, zero: bool
) -> None:
    inputs = shared((rank,) * branches, 3 * blocks, *widths, gating=gating, segment_count=3, trained=trained)
    if zero:
        inputs = replace(inputs, gates=inputs.gates * (inputs.gates > 0.25))
    for impl in IMPLS:
        exact(inputs, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("gating", GATINGS)
@pytest.mark.parametrize(
    ("dtype", "expert_dtype"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.float16, None), (torch.bfloat16, torch.float32)],
    ids=["fp32", "bf16", "fp16", "bf16-master"],
)
def test_error_budget(dtype: torch.dtype, expert_dtype: torch.dtype | None, gating: str, impl: str) -> None:
    inputs = shared((8, 8, 8, 8), 256, 64, 96, gating=gating, trained=3, dtype=torch.float32)
    inputs = inputs.to(dtype, expert_dtype)
    actual = run_layer(inputs, impl)
    assert actual["y"].dtype == dtype and actual["da"].dtype == (expert_dtype or dtype)
    assert_within_budget(actual, layer_plain(inputs), layer_oracle(inputs))


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)]
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("trained", [0, 1, 3, 4])
@pytest.mark.parametrize("gating", GATINGS)
def test_native_rounding(
    gating: str, trained: int, dropout: float, dtypes: tuple[torch.dtype, torch.dtype | None]
) -> None:
    for tokens in (24, 600):
        inputs = shared((9,) * 4, tokens, 130, 90, gating=gating, trained=trained, dtype=torch.float32)
        inputs = inputs.to(*dtypes)
        with poisoned_allocations():
            found = run_layer(inputs, "native", dropout=dropout, seed=11)
        keep = dropout_mask(11, *inputs.x.shape, dropout) if dropout else None
        assert_within_rounding(found, inputs, keep, keep_scale(dropout) if dropout else 1.0)


@pytest.mark.parametrize("impl", ["cpu", "native"])
def test_tokens_of_frozen_branches_alone_train_a(impl: str) -> None:
    inputs = shared(trained=2, dtype=torch.float32)
    gates = inputs.gates.clone()
    gates[::2, 2:] = 0
    inputs = replace(inputs, gates=gates)
    assert_within_rounding(run_layer(inputs, impl), inputs)


@pytest.mark.parametrize("name", SHAPES)
def test_native_shapes(name: str) -> None:
    inputs = shared(**SHAPES[name] | {"dtype": torch.float32})
    with poisoned_allocations():
        found = run_layer(inputs, "native")
    assert_within_rounding(found, inputs)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("gating", GATINGS)
def test_dropout(gating: str, impl: str) -> None:
    inputs = shared(gating=gating, trained=2)
    oracle = layer_oracle(inputs, dropout_mask(11, *inputs.x.shape, 0.25), keep_scale(0.25))
    found = run_layer(inputs, impl, dropout=0.25, seed=11)
    torch.testing.assert_close(found, oracle, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_input(impl: str) -> None:
    inputs = shared(trained=2)
    exact(replace(inputs, x=inputs.x.t().contiguous().t(), dy=inputs.dy.t().contiguous().t()), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_batch_equals_batches_of_one(impl: str) -> None:
    inputs = shared(trained=2)
    whole, sums = run_layer(inputs, impl), {}
    for s in range(4):
        rows = slice(6 * s, 6 * s + 6)
        one = replace(inputs, x=inputs.x[rows], dy=inputs.dy[rows], gates=inputs.gates[s : s + 1])
        alone = run_layer(one, impl)
        torch.testing.assert_close(alone["y"], whole["y"][rows], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(alone["dx"], whole["dx"][rows], rtol=1e-13, atol=1e-13)
        sums = {name: sums.get(name, 0) + alone[name] for name in ("da", "db")}
    torch.testing.assert_close(sums, {name: whole[name] for name in sums}, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("needs", ["x", "gates", "a", "b", "none"])
def test_each_gradient_alone(needs: str) -> None:
    """What does not require grad gets none, and the others do not change."""
    inputs = shared(trained=2)
    oracle = layer_oracle(inputs)
    experts = inputs.experts() if needs in "ab" else inputs.experts().freeze()
    if needs in "ab":
        experts.trained_a.requires_grad_(needs == "a")
        experts.trained_b.requires_grad_(needs == "b")
    x = inputs.x.clone().requires_grad_(needs == "x")
    gates = inputs.gates.clone().requires_grad_(needs == "gates")
    y = expert_lora(x, inputs.weight, None, experts, gates, impl="cpu")
    assert y.requires_grad == (needs != "none")
    if needs == "none":
        return
    y.backward(inputs.dy)
    leaves = {"x": x, "gates": gates, "a": experts.trained_a, "b": experts.trained_b}
    assert {name for name, leaf in leaves.items() if leaf is not None and leaf.grad is not None} == {needs}
    torch.testing.assert_close(leaves[needs].grad, oracle[f"d{needs}"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck(impl: str) -> None:
    inputs = shared((2, 2, 2), 4, 3, 4, segment_count=2, trained=2)
    gates = inputs.gates * torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    experts = inputs.experts()

    def layer(x: Tensor, gates: Tensor, *_: Tensor) -> Tensor:
        return expert_lora(x, inputs.weight, inputs.bias, experts, gates, dropout=0.3, impl=impl)

    leaves = (inputs.x.requires_grad_(), gates.requires_grad_(), experts.trained_a, experts.trained_b)
    assert torch.autograd.gradcheck(layer, leaves)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("gating", GATINGS)
@pytest.mark.parametrize("closed", ["all", "trained"])
def test_segments_stay_apart(closed: str, gating: str, bad: float) -> None:
    """A poisoned segment reaches no other row; nor dB where its trained gates are 0, nor dA where all are."""
    inputs = shared(gating=gating)
    poisoned = inputs.segments == 1 if gating == "map" else torch.arange(24) // 6 == 1
    gates = inputs.gates.clone()
    gates[torch.arange(24) // 6 == 1 if gating == "token" else 1, 0 if closed == "all" else 3 :] = 0
    clean = replace(inputs, gates=gates, dy=inputs.dy.masked_fill(poisoned[:, None], 0))
    expected = run_layer(clean, "cpu")
    found = run_layer(replace(clean, x=inputs.x.masked_fill(poisoned[:, None], bad)), "cpu")
    for name in ("y", "dx"):
        torch.testing.assert_close(found[name][~poisoned], expected[name][~poisoned])
    torch.testing.assert_close(found["db"], expected["db"])
    assert found["da"].isfinite().all() == (closed == "all")
    if closed == "all":
        torch.testing.assert_close(found["da"], expected["da"])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", ["inference", "training", "gate_gradient"])
@pytest.mark.parametrize("unused", [0, 1])
def test_unused_branch_may_hold_nan(unused: int, mode: str, impl: str) -> None:
    inputs = shared()
    used = torch.arange(4) != unused
    inputs = replace(inputs, gates=inputs.gates * used)
    b = list(inputs.b)
    b[unused] = torch.full_like(b[unused], torch.nan)
    experts, oracle = replace(inputs, b=tuple(b)).experts(), layer_oracle(inputs)
    if mode == "inference":
        with torch.no_grad():
            y = expert_lora(inputs.x, inputs.weight, inputs.bias, experts, inputs.gates, impl=impl)
        torch.testing.assert_close(y, oracle["y"])
        return
    gates = inputs.gates.clone().requires_grad_(mode == "gate_gradient")
    x = inputs.x.clone().requires_grad_()
    y = expert_lora(x, inputs.weight, inputs.bias, experts, gates, impl=impl)
    y.backward(inputs.dy)
    torch.testing.assert_close(y, oracle["y"])
    torch.testing.assert_close(experts.trained_b.grad, oracle["db"])
    if impl == "cpu":
        torch.testing.assert_close(x.grad, oracle["dx"])
        torch.testing.assert_close(experts.trained_a.grad, oracle["da"])
    if mode == "gate_gradient":
        torch.testing.assert_close(gates.grad[:, used], oracle["dgates"][:, used])


@pytest.mark.parametrize("grad", [False, True])
def test_unused_a_may_hold_nan(grad: bool) -> None:
    """With every gate 0 the layer is its base linear, whatever the experts hold."""
    inputs = shared()
    inputs = replace(inputs, a=(torch.full_like(inputs.a[0], torch.nan),) * 4)
    x = inputs.x.clone().requires_grad_(grad)
    experts = inputs.experts()
    with torch.set_grad_enabled(grad):
        y = expert_lora(x, inputs.weight, inputs.bias, experts, torch.zeros_like(inputs.gates), impl="cpu")
    torch.testing.assert_close(y, torch.nn.functional.linear(x, inputs.weight, inputs.bias))
    if grad:
        y.backward(inputs.dy)
        torch.testing.assert_close(x.grad, inputs.dy @ inputs.weight)
        assert experts.trained_a.grad.eq(0).all() and experts.trained_b.grad.eq(0).all()


@pytest.mark.parametrize("gates_need_grad", [False, True])
def test_saved_bytes(gates_need_grad: bool) -> None:
    """One Z for all branches; the gated copies are made again."""
    inputs = shared((16,) * 8, 1024, 512, 512, segment_count=8, trained=6, dtype=torch.float32)
    inputs = inputs.to(torch.bfloat16)
    experts, gates = inputs.experts(), inputs.gates.clone().requires_grad_(gates_need_grad)
    living = (inputs.x.requires_grad_(), inputs.weight, inputs.bias, experts.a, experts.bt)
    known = {tensor.untyped_storage().data_ptr() for tensor in living}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        expert_lora(inputs.x, inputs.weight, inputs.bias, experts, gates, dropout=0.05, impl="cpu")
    assert 1024 * 16 * 2 <= sum(found.values()) <= 1024 * 16 * 2 + 4096


# The compiler itself instantiates autograd.Function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_whole() -> None:
    inputs = shared(trained=2, dtype=torch.float32)
    experts = inputs.experts()

    def step(x: Tensor) -> Tensor:
        return expert_lora(x * 2, inputs.weight, None, experts, inputs.gates, dropout=0.1).tanh()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        experts.zero_grad()
        x = inputs.x.clone().requires_grad_()
        y = function(x)
        y.backward(inputs.dy)
        results.append((y.detach(), x.grad, experts.trained_a.grad, experts.trained_b.grad))
    torch.testing.assert_close(*results)


CALLS: dict[str, Callable[[LayerInputs, str], object]] = {
    "expert_lora": lambda i, impl: expert_lora(i.x, i.weight, i.bias, i.experts(), i.gates, impl=impl),
    "stacked_expert_lora": lambda i, impl: stacked_expert_lora(
        i.x, [(i.weight, i.bias, replace(i, shared_a=False).experts()), (i.weight, i.bias, i.experts())],
        i.gates, impl=impl,
    )[1],
    "routed_expert_lora": lambda i, impl: routed_expert_lora(
        i.x, i.weight, i.bias, i.experts(), torch.ones(4, 3), torch.zeros(4, 3), 1.0, impl=impl
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_auto_takes_what_can_and_a_request_is_refused(name: str) -> None:
    """float32 on a CPU, which the native implementation would take by default."""
    inputs = shared(dtype=torch.float32)
    if name == "routed_expert_lora":
        inputs = replace(inputs, gates=torch.full((4, 4), 0.25))
    y = CALLS[name](inputs, "auto")
    torch.testing.assert_close(y, layer_oracle(inputs)["y"].float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(CALLS[name](inputs, "native"), y)
    with pytest.raises(NotImplementedError, match=rf"{name} with a shared A has no 'triton'"):
        CALLS[name](inputs, "triton")
