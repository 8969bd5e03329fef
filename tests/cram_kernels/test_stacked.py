"""stacked_expert_lora: the same as layer after layer, in values and gradients, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cram_kernels import expert_lora, native_libraries, pack_experts, stacked_expert_lora
from cram_kernels.expert_lora import native
from cram_kernels.testing import assert_within_budget, layer_inputs

_MISSING = native_libraries()["cpu"]
IMPLS = ("reference", "cpu", "triton", "native")
WIDTHS, RANKS = (28, 12, 20), ((4, 9, 1), (2, 3, 16), (5, 0, 6))


def make_layers(
    count: int, trained: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[list[tuple[Tensor, Tensor, Any]], list[Tensor]]:
    """Layers that read the same 20 features, and a gradient of each output."""
    made = [
        layer_inputs(ranks, 24, 20, width, trained=trained, seed=p).to(dtype)
        for p, (width, ranks) in enumerate(zip(WIDTHS[:count], RANKS, strict=False))
    ]
    return [(one.weight, one.bias, one.experts()) for one in made], [one.dy for one in made]


def run(
    stacked: bool, count: int, impl: str, dropout: float, trained: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Values and gradients, from one call or from one call a layer."""
    layers, dys = make_layers(count, trained, dtype)
    inputs = layer_inputs((1, 1, 1), 24, 20).to(dtype)
    x, gates = inputs.x.requires_grad_(), inputs.gates.requires_grad_()
    options: dict[str, Any] = {"dropout": dropout, "seed": 9, "impl": impl}
    if stacked:
        ys = stacked_expert_lora(x, layers, gates, **options)
    else:
        ys = tuple(expert_lora(x, *layer, gates, **options) for layer in layers)
    torch.autograd.backward(ys, dys)
    results = {f"y{p}": y.detach() for p, y in enumerate(ys)} | {"dx": x.grad, "dgates": gates.grad}
    for p, (_, _, experts) in enumerate(layers):
        if trained:
            results |= {f"da{p}": experts.trained_a.grad, f"db{p}": experts.trained_b.grad}
    return results


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("count", "trained"), [(1, 1), (2, 0), (3, 2)])
def test_equals_layer_after_layer(count: int, trained: int, dropout: float, impl: str) -> None:
    assert_within_budget(
        run(True, count, impl, dropout, trained),
        run(False, count, "reference", dropout, trained),
        run(False, count, "reference", dropout, trained, torch.float64),
    )


@pytest.mark.skipif(_MISSING is not None, reason=str(_MISSING))
@pytest.mark.parametrize("biased", [(True, True, True), (False, False, False), (True, False, True)])
@pytest.mark.parametrize("tokens", [3, 24, 72])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_inference_has_the_bits_of_each_layer(
    dtype: torch.dtype, tokens: int, biased: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call where all have a bias or none; one expert is unused, another has no row."""
    layers, _ = make_layers(3, dtype=dtype)
    layers = [(w, b if own else None, e) for (w, b, e), own in zip(layers, biased, strict=True)]
    inputs = layer_inputs((1, 1, 1), tokens, 20, segment_count=3).to(dtype)
    gates = inputs.gates * torch.tensor([1, 0, 1])
    with torch.no_grad():
        expected = [expert_lora(inputs.x, *layer, gates, impl="native") for layer in layers]
        alone: list[Tensor] = []
        one = native.expert_lora
        monkeypatch.setattr(native, "expert_lora", lambda *given: alone.append(one(*given)) or alone[-1])
        found = stacked_expert_lora(inputs.x, layers, gates, impl="native")
    assert len(alone) == (0 if len(set(biased)) == 1 else 3)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_one_output_may_go_unused(impl: str) -> None:
    layers, dys = make_layers(3)
    inputs = layer_inputs((1, 1, 1), 24, 20)
    x = inputs.x.requires_grad_()
    stacked_expert_lora(x, layers, inputs.gates, impl=impl)[1].backward(dys[1])
    alone = inputs.x.detach().clone().requires_grad_()
    expert_lora(alone, *layers[1], inputs.gates, impl="reference").backward(dys[1])
    torch.testing.assert_close(x.grad, alone.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_autocast(impl: str) -> None:
    layers, _ = make_layers(2)
    inputs = layer_inputs((1, 1, 1), 24, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ys = stacked_expert_lora(inputs.x, layers, inputs.gates, impl=impl)
        expected = [expert_lora(inputs.x, *layer, inputs.gates, impl=impl) for layer in layers]
    assert all(y.dtype == torch.bfloat16 and torch.equal(y, e) for y, e in zip(ys, expected, strict=True))


def test_refusals() -> None:
    layers, _ = make_layers(3)
    inputs = layer_inputs((1, 1, 1), 24, 20)
    for wrong in ([], [*layers, layers[0]]):
        with pytest.raises(ValueError, match=f"layers must be one to 3, got {len(wrong)}"):
            stacked_expert_lora(inputs.x, wrong, inputs.gates)
    other = pack_experts([torch.ones(2, 20)] * 3, [torch.ones(12, 2)] * 3, scale=1.0)
    with pytest.raises(ValueError, match=r"must share their scale, got \[1.0, 2.0\]"):
        stacked_expert_lora(inputs.x, [layers[0], (layers[1][0], None, other)], inputs.gates)
    with pytest.raises(ValueError, match=r"weight must be \[28, 20\]"):
        stacked_expert_lora(inputs.x, [(layers[1][0], None, layers[0][2])], inputs.gates)
