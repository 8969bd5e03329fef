"""Leaf parameters with other memory or another tensor in their place: their values count, nothing is lost."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, vector_to_parameters

from cram_kernels import (
    PackedExperts,
    bound_expert_lora,
    expert_lora,
    pack_experts,
    routed_expert_lora,
    stacked_expert_lora,
)
from cram_kernels.testing import LayerInputs, layer_inputs

IMPLS = ("reference", "cpu", "native", "triton")


class Layer(nn.Module):
    """One layer, as a model holds it."""

    def __init__(self, inputs: LayerInputs, impl: str, form: str = "one", shared_a: bool = False) -> None:
        super().__init__()
        self.experts, self.inputs, self.impl, self.form = inputs.experts(), inputs, impl, form
        if shared_a:
            ranks = [torch.randn(28, 3, generator=torch.Generator().manual_seed(i)) for i in range(4)]
            self.experts = pack_experts([inputs.a[0][:3]] * 4, ranks, 2.0, trained=1, shared_a=True)

    def forward(self, x: Tensor) -> Tensor:
        inputs, base = self.inputs, (self.inputs.weight, self.inputs.bias, self.experts)
        if self.form == "stacked":
            return torch.cat(stacked_expert_lora(x, [base, base], inputs.gates, impl=self.impl))
        if self.form == "routed":
            generator = torch.Generator().manual_seed(1)
            query, centroids = torch.randn(4, 6, generator=generator), torch.randn(4, 6, generator=generator)
            return routed_expert_lora(x, *base, query, centroids, 3.0, impl=self.impl)
        return expert_lora(x, *base, inputs.gates, impl=self.impl)


def doubled(layer: Layer) -> Layer:
    """A layer whose packed storage holds what the replaced leaves of the other one do."""
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.experts.trained_a.mul_(2)
        other.experts.trained_b.mul_(2)
    return other


class Twice(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return 2 * values


def by_functional_call(layer: Layer) -> Callable[[Tensor], Tensor]:
    new = {f"experts.{name}": 2 * leaf.detach() for name, leaf in layer.experts.named_parameters()}
    for value in new.values():
        value.requires_grad_()
    return lambda x: torch.func.functional_call(layer, new, (x,))


def by_data(layer: Layer) -> Callable[[Tensor], Tensor]:
    for leaf in layer.experts.parameters():
        leaf.data = 2 * leaf.data
    return layer


def by_vector(layer: Layer) -> Callable[[Tensor], Tensor]:
    leaves = list(layer.experts.parameters())
    vector_to_parameters(torch.cat([2 * leaf.detach().flatten() for leaf in leaves]), leaves)
    return layer


def by_parametrization(layer: Layer) -> Callable[[Tensor], Tensor]:
    for name in ("trained_a", "trained_b"):
        parametrize.register_parametrization(layer.experts, name, Twice())
    return layer


WAYS = {
    "functional_call": by_functional_call,
    "data": by_data,
    "vector_to_parameters": by_vector,
    "parametrization": by_parametrization,
}


@pytest.mark.parametrize("form", ["one", "stacked", "routed", "shared_a"])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("way", WAYS)
def test_values_in_the_place_of_a_leaf_count(way: str, impl: str, form: str) -> None:
    if form == "shared_a" and impl == "triton":
        pytest.skip("Triton has no layers with a shared A")
    layer = Layer(layer_inputs(trained=1), impl, form, shared_a=form == "shared_a")
    x = layer.inputs.x.clone().requires_grad_()
    expected_y = doubled(layer)(x)
    (expected_dx,) = torch.autograd.grad(expected_y.square().sum(), x)
    call = WAYS[way](layer)
    y = call(x)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close((y, dx), (expected_y, expected_dx))
    with torch.no_grad():
        torch.testing.assert_close(call(x), expected_y)


@pytest.mark.parametrize("impl", ["cpu", "native", "triton"])
def test_gradients_reach_the_tensor_in_the_place_of_a_leaf(impl: str) -> None:
    layer = Layer(layer_inputs(trained=1), impl)
    other = doubled(layer)
    new = {
        f"experts.{name}": leaf.detach().clone().requires_grad_()
        for name, leaf in other.experts.named_parameters()
    }
    torch.func.functional_call(layer, new, (layer.inputs.x,)).square().sum().backward()
    other(layer.inputs.x).square().sum().backward()
    torch.testing.assert_close(
        [value.grad for value in new.values()], [leaf.grad for leaf in other.experts.parameters()]
    )
    assert all(leaf.grad is None for leaf in layer.experts.parameters())


# The compiler itself instantiates autograd.Function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("impl", ["cpu", "native"])
def test_the_compiler_sees_another_tensor_in_the_place_of_a_leaf(impl: str) -> None:
    layer = Layer(layer_inputs(trained=1), impl)
    expected = doubled(layer)(layer.inputs.x)
    new = {f"experts.{name}": 2 * leaf.detach() for name, leaf in layer.experts.named_parameters()}

    def call(x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, new, (x,))

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(layer.inputs.x), expected)


def test_stacked_models_have_values_of_their_own() -> None:
    """vmap over the parameters of several models, as torch.func documents ensembles."""
    first = Layer(layer_inputs(trained=1), "native")
    layers = [first, doubled(first)]
    names = [name for name, _ in layers[0].named_parameters()]
    new = {name: torch.stack([dict(each.named_parameters())[name] for each in layers]) for name in names}
    with torch.no_grad():
        found = torch.func.vmap(
            lambda values: torch.func.functional_call(layers[0], values, (layers[0].inputs.x,))
        )({name: value.detach() for name, value in new.items()})
        for y, layer in zip(found, layers, strict=True):
            torch.testing.assert_close(y, layer(layer.inputs.x))


def reloaded(experts: PackedExperts) -> PackedExperts:
    other = copy.deepcopy(experts)
    other.load_state_dict({name: torch.zeros_like(each) for name, each in experts.state_dict().items()})
    other.load_state_dict(experts.state_dict())
    return other


KEEPS: dict[str, Callable[[PackedExperts], Any]] = {
    "to": lambda experts: experts.double().float(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda experts: pickle.loads(pickle.dumps(experts)),
    "state_dict": reloaded,
    "freeze": lambda experts: experts.freeze(),
    "append": lambda experts: experts.append(torch.ones(1, 20), torch.ones(28, 1)),
    "reserve": lambda experts: experts.reserve(64, 5),
}


@pytest.mark.parametrize("way", KEEPS)
def test_what_is_made_of_a_pack_has_the_values_of_its_leaves(way: str) -> None:
    experts = layer_inputs(trained=1).experts()
    for leaf in experts.parameters():
        leaf.data = leaf.data + 1
    expected = [side.detach().clone() for side in experts.expert(3)]
    torch.testing.assert_close([side.detach() for side in KEEPS[way](experts).expert(3)], expected)


def test_another_shape_is_refused() -> None:
    experts = layer_inputs(trained=1).experts()
    experts.trained_b.data = torch.zeros(5, 28)
    rows = experts.trained_rank
    with pytest.raises(ValueError, match=rf"trained_b must be \[{rows}, 28\], got \[5, 28\]"):
        experts.factors()


def test_values_that_are_copied_back_are_read_from_the_storage() -> None:
    experts = layer_inputs(trained=1).experts()
    experts.trained_b.data = experts.trained_b.data + 1
    assert experts.factors()[1] is not experts.bt and not experts.is_in_place()
    experts.copied_back = True
    assert experts.factors()[1] is experts.bt and not copy.deepcopy(experts).copied_back


def test_a_bound_call_notices_other_memory() -> None:
    inputs = layer_inputs(trained=1)
    experts = inputs.experts()
    with torch.no_grad():
        layers = [(inputs.weight, inputs.bias, experts)]
        bound = bound_expert_lora(inputs.x, layers, inputs.gates)
        if bound is None:
            pytest.skip("no native library")
        assert bound(inputs.x) is not None
        experts.trained_b.data = experts.trained_b.data + 1
        assert bound(inputs.x) is None
        assert bound_expert_lora(inputs.x, layers, inputs.gates) is None


CHANGED: dict[str, Callable[[PackedExperts], PackedExperts]] = {
    "made": lambda experts: experts,
    "to": lambda experts: experts.double().float(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda experts: pickle.loads(pickle.dumps(experts)),
    "load_assign": lambda experts: (
        experts.load_state_dict({k: v.clone() for k, v in experts.state_dict().items()}, assign=True)
        and experts
    ),
}


@pytest.mark.parametrize("impl", ["cpu", "native", "triton"])
@pytest.mark.parametrize("side", ["trained_a", "trained_b"])
@pytest.mark.parametrize("way", CHANGED)
def test_a_step_since_forward_is_noticed(way: str, side: str, impl: str) -> None:
    inputs = layer_inputs(trained=1)
    experts = CHANGED[way](inputs.experts())
    y = expert_lora(inputs.x.requires_grad_(), inputs.weight, inputs.bias, experts, inputs.gates, impl=impl)
    with torch.no_grad():
        getattr(experts, side).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.square().sum().backward()


def test_rows_that_are_missing_are_refused() -> None:
    """They lie at the right address."""
    experts = layer_inputs(trained=1).experts()
    experts.trained_a.data = experts.trained_a.data[:1]
    with pytest.raises(ValueError, match=r"trained_a must be \[.*, 20\], got \[1, 20\]"):
        experts.factors()


@pytest.mark.parametrize("way", CHANGED)
def test_copies_in_bfloat16_follow_steps_of_a_pack_that_lends_its_storage(way: str) -> None:
    training = CHANGED[way](layer_inputs(trained=1).experts())
    frozen = PackedExperts(training.a, training.bt, training.ranks, training.scale)
    frozen.narrowed()
    (training.trained_a.sum() + training.trained_b.sum()).backward()
    torch.optim.SGD(training.parameters(), lr=0.5).step()
    for copied, own in zip(frozen.narrowed(), (training.a, training.bt), strict=True):
        assert torch.equal(copied, own.bfloat16())
