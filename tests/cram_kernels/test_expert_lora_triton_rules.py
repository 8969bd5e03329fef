"""expert_lora on Triton: what it keeps apart, where it reads and writes, what it saves, what it refuses."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cram_kernels import PackedExperts, dropout_mask, expert_lora
from cram_kernels.expert_lora.dropout import keep_scale
from cram_kernels.launch import Launch
from cram_kernels.testing import GATINGS, LayerInputs, assert_within_rounding, layer_inputs, run_layer
from tests.cram_kernels.devices import BF16, FP16, FP32, needs_interpreter, on_devices, quiet_numpy

pytestmark = quiet_numpy
GUARD = 64


def segment_of_token(inputs: LayerInputs) -> Tensor:
    """Return the row of gates of each token: [T]."""
    if inputs.segments is not None:
        return inputs.segments
    tokens = torch.arange(len(inputs.x), device=inputs.x.device)
    return tokens // (len(tokens) // len(inputs.gates))


@on_devices(cpu=(FP16,))
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("side", ["x", "dy"])
@pytest.mark.parametrize("gating", GATINGS)
def test_segments_stay_apart(gating: str, side: str, bad: float, device: str, dtype: torch.dtype) -> None:
    """Rows of a poisoned segment reach no row beside them in a block, and no gradient whose gate is 0."""
    inputs = layer_inputs(gating=gating).to(dtype, device=device)
    inputs.gates[1, 3] = 0
    poisoned = segment_of_token(inputs) == 1
    assert 0 < poisoned[:16].sum() < 16
    # The base linear gives NaN in poisoned rows alone; what the others get must not change by a bit.
    expected = run_layer(inputs, "triton")
    found = run_layer(
        replace(inputs, **{side: getattr(inputs, side).masked_fill(poisoned[:, None], bad)}), "triton"
    )
    for name in ("y", "dx"):
        assert torch.equal(found[name][~poisoned], expected[name][~poisoned])
    others = [s for s in range(len(inputs.gates)) if s != 1]
    assert torch.equal(found["dgates"][others], expected["dgates"][others])
    clean = replace(inputs, dy=inputs.dy.masked_fill(poisoned[:, None], 0))
    assert_within_rounding({name: found[name] for name in ("da", "db")}, clean)


@on_devices()
@pytest.mark.parametrize("part", ["a", "b"])
@pytest.mark.parametrize("mode", ["inference", "training", "gate_gradient"])
def test_unused_expert_may_hold_nan(mode: str, part: str, device: str, dtype: torch.dtype) -> None:
    inputs = layer_inputs().to(dtype, device=device)
    inputs = replace(inputs, gates=inputs.gates * torch.tensor([1, 0, 1, 1], device=device))
    factors = list(getattr(inputs, part))
    factors[1] = torch.full_like(factors[1], torch.nan)
    experts = replace(inputs, **{part: tuple(factors)}).experts()
    experts = experts.freeze() if mode == "inference" else experts
    x = inputs.x.clone().requires_grad_(mode != "inference")
    gates = inputs.gates.clone().requires_grad_(mode == "gate_gradient")
    y = expert_lora(x, inputs.weight, inputs.bias, experts, gates, impl="triton")
    assert_within_rounding({"y": y.detach()}, inputs)
    if mode == "inference":
        return
    y.backward(inputs.dy)
    grads = {"dx": x.grad, "da": experts.trained_a.grad, "db": experts.trained_b.grad}
    assert_within_rounding(grads, inputs)
    if mode == "gate_gradient":
        # The unused expert's own gate has no true gradient; what it gets must be finite for the softmax.
        assert gates.grad[:, 1].isfinite().all()
        gates.grad[:, 1] = 0
        factors[1] = torch.zeros_like(factors[1])
        assert_within_rounding({"dgates": gates.grad}, replace(inputs, **{part: tuple(factors)}))


@on_devices()
def test_nan_of_an_expert_stays_in_the_blocks_that_use_it(device: str, dtype: torch.dtype) -> None:
    """Rows of 128 tokens that leave the expert out share no block with those that use it."""
    inputs = layer_inputs(tokens=256, segment_count=2).to(dtype, device=device)
    inputs.gates[0, 1] = 0
    b = list(inputs.b)
    b[1] = torch.full_like(b[1], torch.nan)
    found = run_layer(replace(inputs, b=tuple(b)), "triton")
    first = slice(0, 128)
    part = replace(inputs, x=inputs.x[first], dy=inputs.dy[first], gates=inputs.gates[:1])
    assert_within_rounding({name: found[name][first] for name in ("y", "dx")}, part)
    assert found["y"][128:].isnan().all()


@on_devices()
def test_negative_and_huge_gates(device: str, dtype: torch.dtype) -> None:
    huge = 100.0 if dtype == FP16 else 1e6
    rows = [[-1.0, 2, 0, huge], [0, 0, 0, 0], [1, 0, 0, 0], [-huge, 0, 0, 1]]
    inputs = replace(layer_inputs(trained=2), gates=torch.tensor(rows)).to(dtype, device=device)
    assert_within_rounding(run_layer(inputs, "triton"), inputs)


@on_devices()
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_unknown_segment_shows_in_its_rows(integer: torch.dtype, device: str, dtype: torch.dtype) -> None:
    """A kernel cannot raise: the rows of a segment that does not exist are NaN, and only those.

    The public operation refuses such CPU tensors, so the implementation is called itself.
    """
    implementation = pytest.importorskip("cram_kernels.expert_lora.triton", exc_type=ImportError)
    inputs = layer_inputs(gating="map", trained=0).to(dtype, device=device)
    segments = inputs.segments.to(integer)
    lost, values = [3, 9, 20], [4, -1, 2**31 - 1]
    if integer == torch.int64:
        # What 32 bits would take for segment 0.
        values = [4, -(2**32), 2**32]
    segments[lost] = torch.tensor(values, dtype=integer, device=device)
    x, gates = inputs.x.clone().requires_grad_(), inputs.gates.clone().requires_grad_()
    arguments = (inputs.weight, inputs.bias, inputs.experts(), gates, segments, 0.0, 0)
    y = implementation.expert_lora(x, *arguments)
    y.backward(inputs.dy)
    known = [t for t in range(24) if t not in lost]
    part = replace(inputs, x=inputs.x[known], dy=inputs.dy[known], segments=inputs.segments[known])
    assert_within_rounding({"y": y.detach()[known], "dx": x.grad[known], "dgates": gates.grad}, part)
    assert y[lost].isnan().all() and x.grad[lost].isnan().all()
    with torch.no_grad():
        assert torch.equal(implementation.expert_lora(x, *arguments).isnan(), y.isnan())


class Guarded:
    """Stands in for `Launch.run`: each tensor lies between elements that must be neither used nor changed.

    NaN (or an index that does not exist) fills these guards and the gaps between rows.
    """

    def __init__(self, run: Callable[[Launch], None]) -> None:
        self.run = run
        self.kernels: set[str] = set()
        self.moved: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def __call__(self, launch: Launch) -> None:
        self.moved.clear()
        arguments = {name: self.guard(value) for name, value in launch.arguments.items()}
        self.run(replace(launch, arguments=arguments))
        for tensor, view, buffer, before in self.moved:
            if tensor.stride() == view.stride() and 0 not in tensor.stride():
                tensor.copy_(view)
            view.fill_(0)
            assert torch.equal(buffer.view(torch.uint8), before.view(torch.uint8)), launch.kernel
        self.kernels.add(launch.kernel.fn.__name__)

    def guard(self, value: Any) -> Any:
        if isinstance(value, tuple):
            items = [self.guard(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        if not isinstance(value, Tensor):
            return value
        span = 1 + sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
        fill = torch.nan if value.is_floating_point() else -7
        buffer = value.new_full((span + 2 * GUARD,), fill)
        view = buffer.as_strided(value.shape, value.stride(), GUARD)
        view.copy_(value) if 0 not in value.stride() else view[0].copy_(value[0])
        before = buffer.clone()
        before.as_strided(value.shape, value.stride(), GUARD).fill_(0)
        self.moved.append((value, view, buffer, before))
        return view


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guarded]:
    """Run every launch of the test between guards."""
    guard = Guarded(Launch.run)
    monkeypatch.setattr(Launch, "run", lambda launch: guard(launch))
    monkeypatch.setattr(Launch, "prepared", lambda launch, tensors: None)
    yield guard


GUARDED: dict[str, tuple[float, dict[str, Any]]] = {
    "uneven": (0.2, {"tokens": 17, "gating": "token"}),
    "even": (0.0, {"tokens": 64, "in_features": 64, "out_features": 64}),
    "map": (0.2, {"tokens": 70, "gating": "map", "ranks": (40, 33, 30, 30), "trained": 2}),
    "planes": (0.0, {"tokens": 20, "in_features": 1100, "out_features": 1030}),
}


@on_devices()
@pytest.mark.parametrize("name", GUARDED)
def test_memory_beyond_the_tensors(name: str, guarded: Guarded, device: str, dtype: torch.dtype) -> None:
    """Every launch reads its arguments' elements and no others, and writes nothing beside its results."""
    dropout, options = GUARDED[name]
    inputs = layer_inputs(**options).to(dtype, device=device)
    mask = dropout_mask(0, *inputs.x.shape, dropout, device), keep_scale(dropout)
    gapped = torch.cat([inputs.x, torch.full_like(inputs.x, torch.nan)], 1)[:, : inputs.x.shape[1]]
    assert_within_rounding(run_layer(replace(inputs, x=gapped), "triton", dropout=dropout), inputs, *mask)
    arguments = (inputs.weight, inputs.bias, inputs.experts().freeze(), inputs.gates, inputs.segments)
    y = expert_lora(gapped, *arguments, dropout=dropout, impl="triton")
    assert_within_rounding({"y": y}, inputs, *mask)
    wanted = {"_shrink", "_fold", "_expand", "_gram", "_reduce_planes", "_expert_sums"}
    wanted |= {"_dropout_bits"} if dropout else set()
    assert guarded.kernels - {"_segment_sums"} == wanted
    assert ("_segment_sums" in guarded.kernels) == (name != "uneven")


@needs_interpreter
def test_rows_beyond_32_bit_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of x and dy 2^30 elements apart, in memory that is reserved and never touched in between."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    # Results need no copy back: the interpreter works on the tensors' own storage.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    inputs = layer_inputs(tokens=4, gating="token").to(FP16)
    apart, base = 1 << 30, 1 << 31

    def far(rows: Tensor) -> Tensor:
        reserve = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        memory = torch.frombuffer(mmap.mmap(-1, (base + 4 * apart) * 2, flags=reserve), dtype=FP16)
        # Wrapped offsets would lie below the first row: they must find other values, not crash.
        memory[: 1 << 10] = 1.0
        view = memory.as_strided(rows.shape, (apart, 1), base)
        return view.copy_(rows)

    assert_within_rounding(run_layer(replace(inputs, x=far(inputs.x), dy=far(inputs.dy)), "triton"), inputs)


@on_devices(cpu=(), cuda=(BF16,))
def test_more_than_2_to_31_elements(device: str, dtype: torch.dtype) -> None:
    """Input and output beyond 2^31 elements: the last rows are as right as they are alone."""
    width, tokens = 8192, 1 + (1 << 31) // 8192 + 40
    few = layer_inputs((4, 9, 5, 8), 40, width, width, gating="token", trained=0).to(dtype, device=device)
    x = torch.zeros(tokens, width, dtype=dtype, device=device)
    dy, gates = torch.zeros_like(x), torch.zeros(tokens, 4, device=device)
    x[-40:], dy[-40:], gates[-40:] = few.x, few.dy, few.gates
    x.requires_grad_()
    y = expert_lora(x, few.weight, few.bias, few.experts(), gates, impl="triton")
    y.backward(dy)
    assert_within_rounding({"y": y.detach()[-40:], "dx": x.grad[-40:]}, few)
    assert (x.grad[:-40] == 0).all()


def saved_bytes(inputs: LayerInputs, experts: PackedExperts, gates: Tensor, dropout: float) -> int:
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
        y = expert_lora(inputs.x, inputs.weight, inputs.bias, experts, gates, dropout=dropout, impl="triton")
    y.sum().backward()
    return sum(found.values())


@on_devices(cpu=(FP16,), cuda=(BF16,))
@pytest.mark.parametrize("master", [False, True], ids=["same", "fp32-master"])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_saved_bytes(dropout: float, master: bool, device: str, dtype: torch.dtype) -> None:
    """Z at its pitch, the mask as bits, gates and owners; no activation but x, no cast copy of experts."""
    ranks, tokens = (4, 5, 6, 7, 8, 9, 4, 6, 8, 9), 128
    inputs = layer_inputs(ranks, tokens, 96, 88, segment_count=8).to(dtype, FP32 if master else None, device)
    inputs.x.requires_grad_()
    gates = inputs.gates.clone().requires_grad_()
    found = saved_bytes(inputs, inputs.experts(), gates, dropout)
    z_bytes, mask_bytes = tokens * 80 * 2, tokens * 16 * (dropout > 0)
    assert z_bytes + mask_bytes <= found <= z_bytes + mask_bytes + gates.numel() * 4 + sum(ranks) * 8


@on_devices(cpu=(FP32,), cuda=(BF16,))
@pytest.mark.parametrize("train_a", [False, True])
def test_x_is_kept_for_da_alone(train_a: bool, device: str, dtype: torch.dtype) -> None:
    inputs = layer_inputs().to(dtype, device=device)
    experts, kept = inputs.experts(), []
    experts.trained_a.requires_grad_(train_a)
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda none: none):
        expert_lora(inputs.x, inputs.weight, inputs.bias, experts, inputs.gates, impl="triton")
    assert (inputs.x.data_ptr() in {tensor.data_ptr() for tensor in kept}) == train_a


@on_devices()
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_inputs_are_left_alone(mode: str, device: str, dtype: torch.dtype) -> None:
    inputs = layer_inputs(gating="map").to(dtype, device=device)
    experts = inputs.experts() if mode == "training" else inputs.experts().freeze()
    tensors = [inputs.x, inputs.weight, inputs.bias, inputs.gates, inputs.dy, inputs.segments]
    tensors += [experts.a, experts.bt, experts.expert_of_row]
    before = [tensor.clone() for tensor in tensors]
    x = inputs.x.detach().requires_grad_(mode == "training")
    y = expert_lora(
        x, inputs.weight, inputs.bias, experts, inputs.gates, inputs.segments, dropout=0.1, impl="triton"
    )
    if mode == "training":
        y.backward(inputs.dy)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@on_devices(cpu=(FP32,), cuda=(FP32,))
@pytest.mark.parametrize("changed", ["trained_a", "trained_b", "gates"])
def test_change_between_forward_and_backward_raises(changed: str, device: str, dtype: torch.dtype) -> None:
    """Backward reads the packed storage and the gates; a change in between must not pass in silence."""
    inputs = layer_inputs().to(dtype, device=device)
    experts = inputs.experts()
    y = expert_lora(inputs.x, inputs.weight, inputs.bias, experts, inputs.gates, impl="triton")
    with torch.no_grad():
        (inputs.gates if changed == "gates" else getattr(experts, changed)).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@on_devices(cpu=(FP32,), cuda=(FP32,))
def test_second_backward_and_second_derivative(device: str, dtype: torch.dtype) -> None:
    inputs = layer_inputs().to(dtype, device=device)
    x = inputs.x.clone().requires_grad_()

    def layer() -> Tensor:
        return expert_lora(x, inputs.weight, inputs.bias, inputs.experts(), inputs.gates, impl="triton")

    (dx,) = torch.autograd.grad(layer().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="must be differentiated once"):
        dx.sum().backward()
    y = layer()
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()
    y = layer()
    twice = [torch.autograd.grad(y, x, inputs.dy, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*twice)


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float64, BF16])
def test_unsupported_precision_is_refused(dtype: torch.dtype) -> None:
    inputs = layer_inputs().to(dtype)
    with pytest.raises(NotImplementedError, match=r"cannot run 'triton' here: .*(float64|bfloat16)"):
        run_layer(inputs, "triton")
