"""Forward-mode differentiation: each operation has the tangent of its formula, or refuses; none drops it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from cram_kernels import bound_expert_lora
from cram_kernels.testing import layer_inputs
from tests.cram_kernels.operations import NAMES, Operation, expected_tangent, made

# torch itself makes formulas of tangents by torch.jit.script, at their first use.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")


def tangents(operation: Operation, inputs: list[Tensor], place: int) -> list[Tensor]:
    """Of the direction of ones, by torch.func.jvp and by a dual tensor."""

    def moved(value: Tensor) -> Tensor:
        return operation(*inputs[:place], value, *inputs[place + 1 :])

    ones = torch.ones_like(inputs[place])
    found = [torch.func.jvp(moved, (inputs[place],), (ones,))[1]]
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(moved(forward_ad.make_dual(inputs[place], ones))).tangent
        assert tangent is not None
        found.append(tangent)
    return found


CASES = [
    *[("layer", place, dropout, trained) for place in (0, 1) for dropout in (0.0, 0.3) for trained in (0, 1)],
    *[("stacked", place, 0.0, trained) for place in (0, 1) for trained in (0, 1)],
    *[("routed", place, 0.0, trained) for place in (0, 1, 2) for trained in (0, 1)],
    *[("gates", place, 0.0, 0) for place in (0, 1)],
    *[("penalty", place, 0.0, 0) for place in (0, 1, 2, 3)],
]


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize(("name", "place", "dropout", "trained"), CASES)
def test_auto_has_the_tangent_of_the_formula(
    name: str, place: int, dropout: float, trained: int, grad: bool
) -> None:
    operation, inputs = made(name, "auto", dropout, trained)
    expected = expected_tangent(name, place, dropout, trained)
    with torch.set_grad_enabled(grad):
        for found in tangents(operation, inputs, place):
            # A quotient of float32 values over 0.02, of a function that bends.
            torch.testing.assert_close(found.detach().double(), expected.detach(), rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_leaves_that_require_grad_keep_both_derivatives(requires_grad: bool) -> None:
    """A reverse derivative through the gates beside the tangent: rows without members stay finite."""
    operation, (query, centroids) = made("gates", "auto")
    centroids.requires_grad_(requires_grad)
    y, tangent = torch.func.jvp(lambda q: operation(q, centroids), (query,), (torch.ones_like(query),))
    assert tangent.abs().max() > 0 and y.requires_grad == requires_grad
    if requires_grad:
        (grad,) = torch.autograd.grad(y.square().sum(), centroids)
        (expected,) = torch.autograd.grad(operation(query, centroids).square().sum(), centroids)
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("impl", ["cpu", "native", "triton"])
@pytest.mark.parametrize("name", NAMES)
def test_an_implementation_without_tangents_refuses(name: str, impl: str) -> None:
    operation, inputs = made(name, impl)
    if name == "penalty" and impl == "cpu":
        found = tangents(operation, inputs, 0)
        # torch gives tangents of scalars in float64.
        torch.testing.assert_close(found, tangents(*made(name, "reference"), 0), check_dtype=False)
        return
    # Where it cannot run at all, the reason is another one.
    message = "inside a level of forward-mode differentiation|has no '|cannot run '"
    with pytest.raises(NotImplementedError, match=message):
        tangents(operation, inputs, 0)
    with forward_ad.dual_level(), torch.no_grad(), pytest.raises(NotImplementedError, match=message):
        operation(*inputs)


def test_a_bound_call_is_none_inside_a_level() -> None:
    inputs = layer_inputs(trained=0)
    with torch.no_grad():
        layers = [(inputs.weight, inputs.bias, inputs.experts())]
        bound = bound_expert_lora(inputs.x, layers, inputs.gates)
        if bound is None:
            pytest.skip("no native library")
        assert bound(inputs.x) is not None
        with forward_ad.dual_level():
            assert bound(inputs.x) is None
            assert bound_expert_lora(inputs.x, layers, inputs.gates) is None


@pytest.mark.parametrize("name", ["layer", "stacked", "routed"])
def test_compiled_calls_keep_the_tangent(name: str) -> None:
    """Compiled around the level, and compiled first outside of one and called again inside of it."""
    operation, (x, *others) = made(name, "auto")
    ones, expected = torch.ones_like(x), expected_tangent(name, 0)

    def tangent(x: Tensor) -> Tensor:
        return torch.func.jvp(lambda x: operation(x, *others), (x,), (ones,))[1]

    for _ in range(2):  # at first the choice of the implementation is new
        torch.compiler.reset()
        with torch.no_grad():
            whole = torch.compile(tangent, fullgraph=True, backend="eager")
            torch.testing.assert_close(whole(x).double(), expected, rtol=5e-3, atol=5e-3)
            inner = torch.compile(operation, backend="eager")
            inner(x, *others)
            with forward_ad.dual_level():
                y = inner(forward_ad.make_dual(x, ones), *others)
                found = forward_ad.unpack_dual(y).tangent
                torch.testing.assert_close(found.double(), expected, rtol=5e-3, atol=5e-3)
