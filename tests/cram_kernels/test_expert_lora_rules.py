"""expert_lora: what it saves, what it leaves alone, what it keeps apart, what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cram_kernels import PackedExperts, expert_lora
from cram_kernels.testing import (
    LayerInputs,
    assert_within_budget,
    layer_inputs,
    layer_oracle,
    layer_plain,
    run_layer,
)

IMPLS = ("reference", "cpu")


def saved_bytes(inputs: LayerInputs, experts: PackedExperts, gates: Tensor, dropout: float = 0.0) -> int:
    """Bytes saved for backward beyond x, the parameters and the packed storage, each storage counted once."""
    living = (inputs.x, inputs.weight, inputs.bias, experts.a, experts.bt)
    known = {tensor.untyped_storage().data_ptr() for tensor in living}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = expert_lora(inputs.x, inputs.weight, inputs.bias, experts, gates, dropout=dropout, impl="cpu")
    y.sum().backward()
    return sum(found.values())


@pytest.mark.parametrize("master", [False, True], ids=["bf16", "fp32-master"])
@pytest.mark.parametrize("gates_need_grad", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_saved_bytes(dropout: float, gates_need_grad: bool, master: bool) -> None:
    """Ten experts of ranks 4 to 9, the last trained: Z and small things, nothing of activation size."""
    ranks, tokens, width = (4, 5, 6, 7, 8, 9, 4, 6, 8, 9), 1024, 512
    inputs = layer_inputs(ranks, tokens, width, width, segment_count=8)
    inputs = inputs.to(torch.bfloat16, torch.float32 if master else None)
    inputs.x.requires_grad_()
    gates = inputs.gates.clone().requires_grad_(gates_need_grad)
    found = saved_bytes(inputs, inputs.experts(), gates, dropout)
    limit = tokens * sum(ranks) * 2 + tokens * 9 * 2 + 64 * 1024
    assert found <= limit
    if not gates_need_grad:
        assert found <= tokens * 9 * 2 + 64 * 1024


def test_frozen_call_saves_no_activation() -> None:
    inputs = layer_inputs(tokens=1024, segment_count=8)
    inputs.x.requires_grad_()
    assert saved_bytes(inputs, inputs.experts().freeze(), inputs.gates) < 1024


@pytest.mark.parametrize("impl", IMPLS)
def test_inputs_are_left_alone(impl: str) -> None:
    inputs = layer_inputs()
    inputs = replace(inputs, gates=inputs.gates * (inputs.gates > 0.3))
    tensors = [inputs.x, inputs.weight, inputs.bias, inputs.gates, inputs.dy]
    before = [tensor.clone() for tensor in tensors]
    experts = inputs.experts()
    packed = experts.a.clone(), experts.bt.clone()
    x = inputs.x.requires_grad_()
    expert_lora(x, inputs.weight, inputs.bias, experts, inputs.gates, impl=impl, dropout=0.1).backward(
        inputs.dy
    )
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert torch.equal(experts.a, packed[0]) and torch.equal(experts.bt, packed[1])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("gating", ["segment", "token", "map"])
def test_segments_stay_apart(gating: str, bad: float, impl: str) -> None:
    """Rows of a poisoned segment reach no other row, and no weight gradient where their gate is zero."""
    inputs = layer_inputs(dtype=torch.float64, gating=gating)
    poisoned = inputs.segments == 1 if gating == "map" else torch.arange(24) // 6 == 1
    gates = inputs.gates.clone()
    gates[torch.arange(24) // 6 == 1 if gating == "token" else 1, 3] = 0
    clean = replace(inputs, gates=gates, dy=inputs.dy.masked_fill(poisoned[:, None], 0))
    expected = run_layer(clean, impl)
    found = run_layer(replace(clean, x=inputs.x.masked_fill(poisoned[:, None], bad)), impl)
    for name in ("y", "dx"):
        torch.testing.assert_close(found[name][~poisoned], expected[name][~poisoned])
    if impl == "cpu":
        torch.testing.assert_close(found["da"], expected["da"])
        torch.testing.assert_close(found["db"], expected["db"])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("part", ["a", "b"])
@pytest.mark.parametrize("mode", ["inference", "training", "gate_gradient"])
def test_unused_expert_may_hold_nan(mode: str, part: str, impl: str) -> None:
    inputs = layer_inputs(dtype=torch.float64)
    inputs = replace(inputs, gates=inputs.gates * torch.tensor([1, 0, 1, 1]))
    factors = list(getattr(inputs, part))
    factors[1] = torch.full_like(factors[1], torch.nan)
    poisoned = replace(inputs, **{part: tuple(factors)})
    if mode == "inference":
        with torch.no_grad():
            y = expert_lora(inputs.x, inputs.weight, inputs.bias, poisoned.experts(), inputs.gates, impl=impl)
        torch.testing.assert_close(y, layer_oracle(inputs)["y"])
        return
    gates = inputs.gates.clone().requires_grad_(mode == "gate_gradient")
    x = inputs.x.clone().requires_grad_()
    experts = poisoned.experts()
    y = expert_lora(x, inputs.weight, inputs.bias, experts, gates, impl=impl)
    y.backward(inputs.dy)
    oracle = layer_oracle(inputs)
    torch.testing.assert_close(y, oracle["y"])
    torch.testing.assert_close(experts.trained_a.grad, oracle["da"])
    if impl == "cpu":
        torch.testing.assert_close(x.grad, oracle["dx"])
    if mode == "gate_gradient":
        assert gates.grad.isfinite().all()
        torch.testing.assert_close(gates.grad[:, [0, 2, 3]], oracle["dgates"][:, [0, 2, 3]])


def test_negative_and_huge_gates() -> None:
    inputs = layer_inputs(dtype=torch.float64)
    inputs = replace(
        inputs, gates=torch.tensor([[-1.0, 2, 0, 1e6], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]).double()
    )
    for impl in IMPLS:
        torch.testing.assert_close(run_layer(inputs, impl), layer_oracle(inputs))


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_follows_linear(impl: str) -> None:
    """x, weight and bias go to the region's dtype; gates, master weights and their gradients stay float32."""
    inputs = layer_inputs((4, 9, 5), 64, 32, 48)
    experts = inputs.experts()
    x, gates = inputs.x.clone().requires_grad_(), inputs.gates.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = expert_lora(x, inputs.weight, inputs.bias, experts, gates, impl=impl)
        assert y.dtype == nn.functional.linear(inputs.x, inputs.weight).dtype == torch.bfloat16
        y.backward(inputs.dy.bfloat16())
    low = inputs.to(torch.bfloat16, torch.float32)
    grads = {"dx": x.grad, "dgates": gates.grad, "da": experts.trained_a.grad, "db": experts.trained_b.grad}
    assert all(grad.dtype == torch.float32 for grad in grads.values())
    assert_within_budget({"y": y.detach(), **grads}, layer_plain(low), layer_oracle(low))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wide = inputs.to(torch.float64)
        assert expert_lora(wide.x, wide.weight, None, wide.experts(), gates.detach()).dtype == torch.float64


def test_second_backward_raises() -> None:
    inputs = layer_inputs()
    x = inputs.x.requires_grad_()
    y = expert_lora(x, inputs.weight, inputs.bias, inputs.experts(), inputs.gates, impl="cpu")
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="must be differentiated once"):
        dx.sum().backward()
    y = expert_lora(x, inputs.weight, inputs.bias, inputs.experts(), inputs.gates, impl="cpu")
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_step_between_forward_and_backward_raises() -> None:
    """Backward reads the packed storage; changing it in between must not give a silent wrong gradient."""
    inputs = layer_inputs()
    experts = inputs.experts()
    y = expert_lora(inputs.x, inputs.weight, inputs.bias, experts, inputs.gates, impl="cpu")
    with torch.no_grad():
        experts.trained_a.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "weight_shape": ({"weight": torch.zeros(28, 19)}, r"weight must be \[28, 20\].*got \[28, 19\]"),
    "x_shape": ({"x": torch.zeros(24, 19)}, r"x must be \[..., 20\], got \[24, 19\]"),
    "x_scalar": ({"x": torch.zeros(())}, r"x must be \[..., 20\]"),
    "x_dtype": (
        {"x": torch.zeros(24, 20).double()},
        "x must have weight's dtype torch.float32, got torch.float64",
    ),
    "bias_shape": ({"bias": torch.zeros(20)}, r"bias must be torch.float32 \[28\], got torch.float32 \[20\]"),
    "weight_grad": ({"weight": torch.zeros(28, 20, requires_grad=True)}, "weight and bias must be frozen"),
    "bias_grad": ({"bias": torch.zeros(28, requires_grad=True)}, "weight and bias must be frozen"),
    "dropout": ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
    "gate_experts": ({"gates": torch.zeros(4, 3)}, r"gates must be \[S, 4\] or \[T, 4\], got \[4, 3\]"),
    "gate_rank": ({"gates": torch.zeros(4)}, r"gates must be \[S, 4\]"),
    "gate_dtype": ({"gates": torch.zeros(4, 4).bfloat16()}, "gates must be float32"),
    "gate_double": ({"gates": torch.zeros(4, 4).double()}, "gates must be float32"),
    "gate_rows": ({"gates": torch.zeros(5, 4)}, "S dividing T = 24, got S = 5"),
    "no_gate_row": ({"gates": torch.zeros(0, 4)}, "S dividing T = 24, got S = 0"),
    "segment_count": (
        {"segments": torch.zeros(23, dtype=torch.int64)},
        r"segments must be int32 or int64 \[24\]",
    ),
    "segment_dtype": ({"segments": torch.zeros(24)}, "segments must be int32 or int64"),
    "impl": ({"impl": "fast"}, "impl must be one of"),
}


@pytest.mark.parametrize("name", BAD)
def test_refusals(name: str) -> None:
    inputs = layer_inputs()
    arguments: dict[str, Any] = {
        "x": inputs.x,
        "weight": inputs.weight,
        "bias": inputs.bias,
        "experts": inputs.experts(),
        "gates": inputs.gates,
    }
    changed, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        expert_lora(**(arguments | changed))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("index", [4, -1])
def test_segments_out_of_range(index: int, impl: str) -> None:
    inputs = layer_inputs()
    segments = torch.zeros(24, dtype=torch.int64)
    segments[5] = index
    with pytest.raises(ValueError, match=r"segments must lie in \[0, 4\), got values"):
        expert_lora(inputs.x, inputs.weight, None, inputs.experts(), inputs.gates, segments, impl=impl)
