"""Second derivatives: right, or an error; never zero or None in their place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import functional

from tests.cram_kernels.operations import NAMES, Operation, expected_tangent, made

# torch itself makes formulas of tangents by torch.jit.script, at their first use.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
REFUSED = "must (not )?be differentiated (once|twice)"
CASES = [
    (name, impl, place)
    for name, places in zip(NAMES, (2, 2, 3, 2, 4), strict=True)
    for impl in ("auto", "cpu", "native", "reference")
    for place in range(places)
    if (name, impl) not in {("gates", "cpu"), ("routed", "cpu"), ("routed", "native")}
]


def is_plain(name: str, impl: str, place: int) -> bool:
    """Whether torch differentiates the formula itself. Gates have the derivative of their kernels always."""
    if name == "penalty":
        return impl in ("cpu", "reference")
    return impl == "reference" and (name in ("layer", "stacked") or (name, place) == ("routed", 0))


def of_place(operation: Operation, inputs: list[Tensor], place: int) -> Operation:
    """The operation as a function of one input alone; the others require gradients too."""
    held = [each.clone().requires_grad_() for each in inputs]
    return lambda each: operation(*held[:place], each, *held[place + 1 :])


@pytest.mark.parametrize(("name", "impl", "place"), CASES)
def test_a_product_with_the_hessian_is_right_or_refused(name: str, impl: str, place: int) -> None:
    operation, inputs = made(name, impl)
    of_one = of_place(operation, inputs, place)
    vector = torch.randn(inputs[place].shape, generator=torch.Generator().manual_seed(7))

    def product() -> Tensor:
        return functional.hvp(lambda each: of_one(each).square().sum(), inputs[place], vector)[1]

    if not is_plain(name, impl, place):
        with pytest.raises(RuntimeError, match=REFUSED):
            product()
        return
    formula = of_place(made(name, "reference")[0], inputs, place)
    gradient = torch.func.grad(lambda each: formula(each).square().sum())
    torch.testing.assert_close(product(), torch.func.jvp(gradient, (inputs[place],), (vector,))[1])


@pytest.mark.parametrize(("name", "impl", "place"), CASES)
def test_a_tangent_by_two_backwards_is_right_or_refused(name: str, impl: str, place: int) -> None:
    operation, inputs = made(name, impl)
    of_one = of_place(operation, inputs, place)
    vector = torch.ones_like(inputs[place])
    if not is_plain(name, impl, place):
        with pytest.raises(RuntimeError, match=REFUSED):
            functional.jvp(of_one, inputs[place], vector)
        return
    found = functional.jvp(of_one, inputs[place], vector)[1]
    torch.testing.assert_close(found.double(), expected_tangent(name, place), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_second_derivatives_of_a_sum_of_gates_are_refused(impl: str) -> None:
    """The incoming gradient is a constant here; the gates' own inputs alone have the second derivative."""
    operation, inputs = made("gates", impl)
    with pytest.raises(RuntimeError, match=REFUSED):
        functional.hessian(lambda query: operation(query, inputs[1])[..., 0].sum(), inputs[0])
