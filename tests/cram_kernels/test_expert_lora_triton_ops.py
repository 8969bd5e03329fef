"""expert_lora on Triton as a registered operation: opcheck, torch.compile, stacks, CUDA graphs, streams."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from cram_kernels import PackedExperts, expert_lora, stacked_expert_lora
from cram_kernels.testing import (
    LayerInputs,
    assert_within_budget,
    assert_within_rounding,
    layer_inputs,
    layer_oracle,
    layer_plain,
    poisoned_allocations,
)
from tests.cram_kernels.devices import BF16, FP16, FP32, on_devices, quiet_numpy

pytestmark = quiet_numpy
implementation = pytest.importorskip("cram_kernels.expert_lora.triton", exc_type=ImportError)
# Ranks of three layers over the same experts, one expert without any row in the first.
STACK = ((0, 9, 5), (4, 9, 1), (2, 3, 16))
OUT = (28, 12, 40)


@pytest.fixture(autouse=True)
def _compile_afresh() -> None:
    """The compiler keeps what it has seen of a function; every test counts from none."""
    torch.compiler.reset()


def stacked_inputs(
    count: int, dtype: torch.dtype, device: str, ranks: tuple[tuple[int, ...], ...] = STACK, **options: Any
) -> list[LayerInputs]:
    """Return the inputs of layers that share x, gates and segments."""
    made = [
        layer_inputs(r, out_features=out, seed=p, **options).to(dtype, device=device)
        for p, (r, out) in enumerate(zip(ranks[:count], OUT, strict=False))
    ]
    return [replace(each, x=made[0].x, gates=made[0].gates, segments=made[0].segments) for each in made]


def together(results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Join the results of layers that share x and gates: their gradients of both add up."""
    joined = {name: sum(one[name] for one in results) for name in ("dx", "dgates")}
    own = {f"{k}{p}": one[k] for p, one in enumerate(results) for k in one if k not in joined}
    return joined | own


STACKS: dict[str, dict[str, Any]] = {
    "three": {"count": 3},
    "two_mapped": {"count": 2, "gating": "map", "trained": 3},
    "no_row_at_all": {"count": 2, "ranks": ((0, 0, 0), (4, 0, 3))},
    "mixed_experts": {"count": 2},
    "long": {"count": 3, "tokens": 96},
    "planes": {"count": 2, "in_features": 1100},
    "skipped": {"count": 2, "ranks": ((64, 64, 20), (40, 64, 64))},
}


@on_devices(cpu=(FP16,))
@pytest.mark.parametrize("name", STACKS)
def test_stack_equals_its_layers(name: str, device: str, dtype: torch.dtype) -> None:
    parts = stacked_inputs(dtype=dtype, device=device, **STACKS[name])
    if name == "mixed_experts":
        parts[1] = parts[1].to(dtype, FP32)
    if name == "skipped":
        parts = [replace(one, gates=one.gates * (one.gates > 0.3)) for one in parts]
    x, gates = parts[0].x.clone().requires_grad_(), parts[0].gates.clone().requires_grad_()
    packs = [one.experts() for one in parts]
    layers = [(one.weight, one.bias, pack) for one, pack in zip(parts, packs, strict=True)]
    with poisoned_allocations():
        ys = stacked_expert_lora(x, layers, gates, parts[0].segments, impl="triton")
        torch.autograd.backward(ys, [one.dy for one in parts])
        frozen = [(weight, bias, pack.freeze()) for weight, bias, pack in layers]
        with torch.no_grad():
            inference = stacked_expert_lora(x, frozen, gates, parts[0].segments, impl="triton")
    found = {f"y{p}": y.detach() for p, y in enumerate(ys)} | {"dx": x.grad, "dgates": gates.grad}
    for p, pack in enumerate(packs):
        found |= {f"da{p}": pack.trained_a.grad, f"db{p}": pack.trained_b.grad}
    plain, oracle = (together([of(one) for one in parts]) for of in (layer_plain, layer_oracle))
    assert_within_budget(found, plain, oracle)
    only_y = {f"y{p}": y for p, y in enumerate(inference)}
    assert_within_budget(only_y, {k: plain[k] for k in only_y}, {k: oracle[k] for k in only_y})


def op_arguments(
    monkeypatch: pytest.MonkeyPatch, parts: list[LayerInputs], *, dropout: float = 0.0
) -> list[Any]:
    """Return what the layers hand to `torch.ops.cram.expert_lora`."""
    seen: list[Any] = []
    forward = implementation._forward

    def note(*arguments: Any) -> list[Tensor]:
        seen[:] = arguments
        return forward(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(implementation, "_forward", note)
        layers = [(one.weight, one.bias, one.experts()) for one in parts]
        x = parts[0].x.clone().requires_grad_()
        stacked_expert_lora(
            x, layers, parts[0].gates, parts[0].segments, dropout=dropout, seed=3, impl="triton"
        )
    return [each.detach() if isinstance(each, Tensor) else each for each in seen]


CHECKED: dict[str, dict[str, Any]] = {
    "inference": {"keep": False},
    "training": {"grads": "x gates trained"},
    "gates_only": {"grads": "gates", "gating": "map", "dropout": 0.2},
    "trained_only": {"grads": "trained", "gating": "token"},
    "x_of_a_stack": {"grads": "x trained", "count": 3},
    "no_expert": {"grads": "x gates", "ranks": ((),)},
    "no_token": {"grads": "x gates trained", "tokens": 0},
}


@on_devices(cpu=(FP32,), cuda=(BF16,))
@pytest.mark.parametrize("name", CHECKED)
def test_opcheck(name: str, device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema, fakes, autograd registration and dynamic shapes of the forward operation."""
    options = {"count": 1, "grads": "", "keep": True, "dropout": 0.0} | CHECKED[name]
    grads, keep, dropout = (options.pop(key) for key in ("grads", "keep", "dropout"))
    parts = stacked_inputs(dtype=dtype, device=device, **options)
    arguments = op_arguments(monkeypatch, parts, dropout=dropout)
    arguments[-1] = keep
    for place, needs in enumerate(["x", "gates", *["trained"] * 6]):
        if isinstance(arguments[place], Tensor):
            arguments[place] = arguments[place].detach().requires_grad_(needs in grads.split())
    torch.library.opcheck(torch.ops.cram.expert_lora.default, tuple(arguments))


@on_devices(cpu=(FP32,), cuda=(BF16,))
@pytest.mark.parametrize(("count", "need"), [(3, "x gates a b"), (1, "x"), (1, "gates"), (1, "a"), (1, "b")])
def test_opcheck_of_backward(
    count: int, need: str, device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = stacked_inputs(count, dtype, device, gating="map" if count == 1 else "segment")
    *head, _ = op_arguments(monkeypatch, parts)
    *_, z, bits = implementation._forward(*head, True)
    x, gates, weights, a, bt, owners, segments = head[0], head[1], head[8], *head[10:14]
    trained = [one.experts().trained_rank for one in parts]
    needs = [name in need.split() for name in ("x", "gates", "a", "b")]
    dys = [one.dy for one in parts]
    arguments = (dys, x, z, bits, gates, weights, a, bt, owners, segments, trained, head[14], *needs)
    torch.library.opcheck(torch.ops.cram.expert_lora_backward.default, arguments)


def test_second_derivative_of_the_operation_raises() -> None:
    """A compiled graph differentiates the operations, not the autograd Function."""
    with pytest.raises(RuntimeError, match="must be differentiated once, got a second derivative"):
        implementation.no_second_derivative(None)


def leaves_of(inputs: LayerInputs, experts: PackedExperts) -> dict[str, Tensor]:
    """Return fresh leaves by name, the experts' without a gradient."""
    experts.zero_grad()
    x, gates = inputs.x.clone().requires_grad_(), inputs.gates.clone().requires_grad_()
    trained = {"a": experts.trained_a, "b": experts.trained_b}
    return {"x": x, "gates": gates} | {k: leaf for k, leaf in trained.items() if leaf is not None}


@on_devices(cpu=(FP32,), cuda=(BF16,))
@pytest.mark.parametrize(("gating", "dropout"), [("segment", 0.2), ("token", 0.0), ("map", 0.2)])
def test_compiles_whole_with_any_token_count(
    gating: str, dropout: float, device: str, dtype: torch.dtype
) -> None:
    """One graph, compiled once for all T, equal to the eager call bit for bit."""
    counter = CompileCounterWithBackend("aot_eager")
    experts = layer_inputs(gating=gating).to(dtype, device=device).experts()

    def step(x: Tensor, inputs: LayerInputs, gates: Tensor) -> Tensor:
        y = expert_lora(
            x * 2, inputs.weight, inputs.bias, experts, gates, inputs.segments, dropout=dropout, impl="triton"
        )
        return y.tanh()

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for tokens in (24, 40, 32):
        inputs = layer_inputs(tokens=tokens, gating=gating, seed=tokens).to(dtype, device=device)
        results = []
        for function in (step, compiled):
            leaves = leaves_of(inputs, experts)
            torch._dynamo.mark_dynamic(leaves["x"], 0)
            if gating == "token":
                torch._dynamo.mark_dynamic(leaves["gates"], 0)
            if gating == "map":
                torch._dynamo.mark_dynamic(inputs.segments, 0)
            y = function(leaves["x"], inputs, leaves["gates"])
            y.backward(inputs.dy)
            results.append([y.detach(), *(leaf.grad.clone() for leaf in leaves.values())])
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert counter.frame_count == 1


@on_devices(cpu=(FP32,), cuda=(BF16,))
@pytest.mark.parametrize(("kind", "graphs"), [(int, 2), (torch.tensor, 1)])
def test_compiled_dropout_takes_a_new_seed_each_step(
    kind: Any, graphs: int, device: str, dtype: torch.dtype
) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    inputs = layer_inputs().to(dtype, device=device)
    experts = inputs.experts()

    def step(x: Tensor, seed: int | Tensor) -> Tensor:
        return expert_lora(
            x, inputs.weight, inputs.bias, experts, inputs.gates, dropout=0.3, seed=seed, impl="triton"
        )

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for seed in (2, 3, 2**40, 2**62, 7, 8, 9, 10, 11, 12):
        assert torch.equal(step(inputs.x, kind(seed)), compiled(inputs.x, kind(seed)))
    assert counter.frame_count == graphs


@on_devices(cpu=(FP32,), cuda=(BF16,))
def test_compiled_inference(device: str, dtype: torch.dtype) -> None:
    inputs = layer_inputs(trained=0).to(dtype, device=device)
    experts = inputs.experts()

    def step(x: Tensor) -> Tensor:
        return expert_lora(x, inputs.weight, None, experts, inputs.gates, impl="triton")

    with torch.no_grad():
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(inputs.x), step(inputs.x))


def decode_step(
    parts: list[LayerInputs], packs: list[PackedExperts], x: Tensor, gates: Tensor, segments: Tensor
) -> tuple[Tensor, ...]:
    layers = [(one.weight, one.bias, pack) for one, pack in zip(parts, packs, strict=True)]
    return stacked_expert_lora(x, layers, gates, segments, impl="triton")


@on_devices(cpu=())
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("tokens", [1, 16, 64, 300])
def test_cuda_graph_replays(tokens: int, count: int, device: str, dtype: torch.dtype) -> None:
    """A captured call sees what changes in place: x, gates, segments, and an expert put into room."""
    parts = stacked_inputs(count, dtype, device, tokens=tokens, gating="map", in_features=1100, trained=0)
    packs = [one.experts().reserve(64, 5) for one in parts]
    gates = torch.nn.functional.pad(parts[0].gates, (0, 2))
    x, segments = parts[0].x.clone(), parts[0].segments.clone()
    with torch.no_grad():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                decode_step(parts, packs, x, gates, segments)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = decode_step(parts, packs, x, gates, segments)
        for seed in range(3):
            fresh = layer_inputs((1, 1, 1), tokens, 1100, gating="map", seed=50 + seed)
            for target, value in ((x, fresh.x), (segments, fresh.segments), (gates[:, :3], fresh.gates)):
                target.copy_(value)
            if seed == 1:
                gates[:, 3] = 0.5
                for one, pack in zip(parts, packs, strict=True):
                    pack.insert(torch.randn(8, 1100), torch.randn(len(one.weight), 8))
            graph.replay()
            for y, expected in zip(captured, decode_step(parts, packs, x, gates, segments), strict=True):
                assert torch.equal(y, expected)


@on_devices(cpu=(), cuda=(BF16,))
def test_streams_do_not_disturb_each_other(device: str, dtype: torch.dtype) -> None:
    batches = [layer_inputs(tokens=48, in_features=1100, seed=s).to(dtype, device=device) for s in range(4)]
    packs = [one.experts().freeze() for one in batches]

    def call(one: LayerInputs, pack: PackedExperts) -> Tensor:
        with torch.no_grad():
            return expert_lora(one.x, one.weight, one.bias, pack, one.gates, impl="triton")

    expected = [call(*pair) for pair in zip(batches, packs, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in batches]
    found: list[list[Tensor]] = [[] for _ in batches]
    for _ in range(50):
        for stream, one, pack, results in zip(streams, batches, packs, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(call(one, pack))
    torch.cuda.synchronize()
    for results, value in zip(found, expected, strict=True):
        assert all(torch.equal(result, value) for result in results)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_on_another_device_than_the_current() -> None:
    inputs = layer_inputs().to(BF16, device="cuda:1")
    x, experts = inputs.x.clone().requires_grad_(), inputs.experts()
    y = expert_lora(x, inputs.weight, inputs.bias, experts, inputs.gates, impl="triton")
    y.backward(inputs.dy)
    assert torch.cuda.current_device() == 0
    assert_within_rounding({"y": y.detach(), "dx": x.grad, "da": experts.trained_a.grad}, inputs)
