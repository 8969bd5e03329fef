"""routed_expert_lora: every implementation is centroid_gates, then expert_lora; gradients, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cram_kernels import routed_expert_lora
from cram_kernels.testing import assert_within_budget, layer_inputs, poisoned_allocations

IMPLS = ("cpu", "triton", "native")
SHAPES: dict[str, dict[str, Any]] = {
    "segments": {},
    "map": {"gating": "map"},
    "tokens": {"gating": "token"},
    "one_sample": {"tokens": 17, "segment_count": 1},
    "no_token": {"tokens": 0},
    "no_rank": {"ranks": (0, 0)},
    "one_expert": {"ranks": (5,)},
    "many_experts": {"ranks": (1,) * 20},
    "wide_rank": {"ranks": (70, 80)},
    "split": {"tokens": 12, "in_features": 1100, "out_features": 70},
    "split_and_folded": {"tokens": 80, "in_features": 1100, "out_features": 70},
}


# The gradient of one query is made of a few sums, and a single draw of these says little about the error of
# plain PyTorch.
DRAWS = {"one_sample": 4}


def run(name: str, impl: str, dtype: torch.dtype, masked: bool = True, seed: int = 3) -> dict[str, Tensor]:
    """Values with and without gradients, and every gradient."""
    inputs = layer_inputs(**SHAPES[name], seed=seed).to(dtype)
    samples, experts = inputs.gates.shape
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(samples, 24, generator=generator).to(dtype).requires_grad_()
    centroids = torch.randn(experts, 24, generator=generator).to(dtype).requires_grad_()
    members = torch.rand(samples, experts, generator=generator) < 0.7 if masked else None
    packed, x = inputs.experts(), inputs.x.requires_grad_()
    arguments = (inputs.weight, inputs.bias, packed, query, centroids, 3.0, members, inputs.segments)
    with torch.no_grad():
        inference = routed_expert_lora(x, *arguments, impl=impl)
    y = routed_expert_lora(x, *arguments, dropout=0.2, seed=5, impl=impl)
    y.backward(inputs.dy)
    leaves = {"x": x, "query": query, "centroids": centroids, "a": packed.trained_a, "b": packed.trained_b}
    grads = {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf is not None}
    return {"inference": inference, "y": y.detach(), **grads}


def drawn(name: str, impl: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What `run` gives for as many draws of the inputs as the shape needs, stacked."""
    runs = [run(name, impl, dtype, seed=3 + draw) for draw in range(DRAWS.get(name, 1))]
    return {key: torch.stack([each[key] for each in runs]) for key in runs[0]}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_two_operations(name: str, impl: str) -> None:
    with poisoned_allocations():
        found = drawn(name, impl, torch.float32)
    plain = drawn(name, "reference", torch.float32)
    assert_within_budget(found, plain, drawn(name, "reference", torch.float64))


def test_budget_catches_another_routing() -> None:
    found = run("segments", "triton", torch.float32, masked=False)
    plain, oracle = (run("segments", "reference", d) for d in (torch.float32, torch.float64))
    with pytest.raises(AssertionError, match="error must be at most"):
        assert_within_budget(found, plain, oracle)


def call(impl: str, **changed: Any) -> Tensor:
    """One call of 24 tokens, 4 samples and 4 experts, with some arguments changed."""
    inputs = layer_inputs(trained=0)
    arguments: dict[str, Any] = {
        "x": inputs.x,
        "weight": inputs.weight,
        "bias": inputs.bias,
        "experts": inputs.experts(),
        "query": torch.ones(4, 8),
        "centroids": torch.ones(4, 8),
        "sigma": 1.0,
    }
    return routed_expert_lora(**(arguments | changed), impl=impl)


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_refusals(impl: str) -> None:
    for changed, message in (
        ({"centroids": torch.ones(3, 8)}, r"centroids must be \[4, D_q\], got \[3, 8\]"),
        ({"centroids": torch.ones(1, 4, 8)}, r"centroids must be \[E, D_q\]"),
        ({"query": torch.ones(4, 7)}, "query and centroids must be"),
        ({"query": torch.ones(5, 8)}, "S dividing T = 24, got S = 5"),
        ({"sigma": 0.0}, "sigma must be positive"),
        ({"x": torch.ones(24, 19)}, r"x must be \[..., 20\]"),
        ({"segments": torch.zeros(3, dtype=torch.int64)}, "segments must be"),
        ({"members": torch.ones(4, 3, dtype=torch.bool)}, "members must be bool"),
        ({"dropout": 1.0}, "dropout must lie"),
    ):
        with pytest.raises(ValueError, match=message):
            call(impl, **changed)


@pytest.mark.parametrize("impl", ["reference", "cpu", "native"])
def test_autocast(impl: str) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = call(impl)
    low = {"x": torch.bfloat16, "weight": torch.bfloat16, "bias": torch.bfloat16}
    inputs = layer_inputs(trained=0)
    expected = call(impl, **{name: getattr(inputs, name).to(dtype) for name, dtype in low.items()})
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_whole_and_passes_opcheck() -> None:
    inputs = layer_inputs()
    packed, query, centroids = inputs.experts(), torch.randn(4, 8), torch.randn(4, 8)

    def step(x: Tensor, query: Tensor) -> Tensor:
        return routed_expert_lora(
            x * 2, inputs.weight, inputs.bias, packed, query, centroids, 2.0, dropout=0.1, impl="triton"
        )

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        packed.zero_grad()
        x, v = inputs.x.clone().requires_grad_(), query.clone().requires_grad_()
        function(x, v).backward(inputs.dy)
        results.append((x.grad, v.grad, packed.trained_a.grad, packed.trained_b.grad))
    torch.testing.assert_close(*results)
    sample = (inputs.x.requires_grad_(), query.requires_grad_(), centroids.requires_grad_())
    rest = (packed.trained_a, packed.trained_b, inputs.weight, inputs.bias, packed.a, packed.bt)
    for mask in ((0.0, None), (0.1, torch.tensor(3))):
        tail = (packed.expert_of_row, None, None, 2.0, 1.0, *mask, True)
        torch.library.opcheck(torch.ops.cram.routed_expert_lora.default, (*sample, *rest, *tail))
