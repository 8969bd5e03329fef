"""The recursion of the merge against dense forms of the same least-squares problem."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cram.methods.parts.merge import MergedWeight, merge
from tests.cram.golden_cases import assert_complete, golden_names, load

Parts = list[tuple[Tensor, Tensor]]


def dense_optimum(parts: Parts, rho: float) -> Tensor:
    """The batch optimum by one direct solve in the input space."""
    gram = sum(a.T @ a for a, _ in parts) + rho * torch.eye(parts[0][0].shape[1], dtype=torch.float64)
    target = sum(b @ a @ a.T @ a for a, b in parts)
    return torch.linalg.solve(gram, target, left=False)


def dense_recursion(parts: Parts, rho: float) -> Tensor:
    """The recursion as it is written, on dense W and R."""
    (a, b), *_ = parts
    w = torch.zeros(b.shape[0], a.shape[1], dtype=torch.float64)
    inverse = torch.eye(a.shape[1], dtype=torch.float64) / rho
    for a, b in parts:
        core = torch.linalg.inv(torch.eye(len(a), dtype=torch.float64) + a @ inverse @ a.T)
        inverse = inverse - inverse @ a.T @ core @ a @ inverse
        w = w + (b @ a - w) @ a.T @ a @ inverse
    return w


def random_parts(ranks: list[int], in_features: int, out_features: int, seed: int, repeats: bool) -> Parts:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    parts = [(draw(rank, in_features), draw(out_features, rank)) for rank in ranks]
    if repeats and len(parts) > 1:
        a, b = parts[0]
        parts[-1] = (a.clone(), draw(*b.shape))
    return parts


def apart(found: Tensor, wanted: Tensor) -> float:
    """Largest difference in units of the largest wanted value."""
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-300))


@settings(deadline=None, max_examples=60)
@given(
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=20),
    in_features=st.integers(1, 40),
    out_features=st.integers(1, 40),
    rho=st.sampled_from([1e-3, 1e-2, 0.3, 5.0]),
    seed=st.integers(0, 2**31),
    repeats=st.booleans(),
    data=st.data(),
)
def test_recursion_equals_the_batch_optimum_in_any_order(
    ranks: list[int],
    in_features: int,
    out_features: int,
    rho: float,
    seed: int,
    repeats: bool,
    data: st.DataObject,
) -> None:
    parts = random_parts(ranks, in_features, out_features, seed, repeats)
    wanted = dense_optimum(parts, rho)
    shuffled = data.draw(st.permutations(parts))
    a, b = merge(shuffled, rho)
    assert a.shape[0] == b.shape[1] == min(sum(len(a) for a, _ in parts), in_features, out_features)
    assert apart(b @ a, wanted) < 1e-8
    assert apart(dense_recursion(shuffled, rho), wanted) < 1e-8


def test_twenty_tasks_of_real_width() -> None:
    parts = random_parts([8] * 20, 512, 384, 0, repeats=True)
    a, b = merge(parts, 1e-2)
    assert a.shape == (160, 512)
    assert apart(b @ a, dense_optimum(parts, 1e-2)) < 1e-8


def test_the_result_minimises_the_objective() -> None:
    parts = random_parts([3, 2, 4], 12, 10, 1, repeats=False)
    a, b = merge(parts, 0.1)
    weight = (b @ a).requires_grad_()
    loss = sum((((weight - b @ a) @ a.T) ** 2).sum() for a, b in parts) + 0.1 * (weight**2).sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.abs().max() < 1e-10 * sum((b @ a @ a.T @ a).abs().max() for a, b in parts)


def test_every_stage_keeps_an_orthonormal_basis_and_the_inverse() -> None:
    merged, gram = MergedWeight.empty(9, 7, 0.5), 0.5 * torch.eye(9, dtype=torch.float64)
    for a, b in random_parts([2, 3, 4, 5], 9, 7, 2, repeats=True):
        merged, gram = merged.add(a, b), gram + a.T @ a
        basis = merged.basis
        torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis), dtype=torch.float64))
        torch.testing.assert_close(merged.inverse, basis @ torch.linalg.inv(gram) @ basis.T)


def test_scale_goes_through() -> None:
    parts = random_parts([3, 5], 16, 12, 3, repeats=False)
    a, b = merge(parts, 0.2)
    assert apart(2 * (b @ a), dense_optimum([(a, 2 * b) for a, b in parts], 0.2)) < 1e-12


def test_the_result_survives_float32_where_two_tasks_are_nearly_alike() -> None:
    (a, b), (_, other), *_ = parts = random_parts([4, 4, 3], 20, 18, 4, repeats=False)
    parts[1] = (a + 1e-6 * torch.randn(a.shape, dtype=a.dtype), other)
    wanted = dense_optimum(parts, 1e-5)
    a, b = (factor.float().double() for factor in merge(parts, 1e-5))
    # A product of 11 terms of float32 factors, one of them orthonormal.
    assert apart(b @ a, wanted) < 11 * 2**-23


def test_float32_and_rank_zero_are_welcome() -> None:
    parts = random_parts([3, 2], 8, 6, 5, repeats=False)
    nothing = (torch.zeros(0, 8), torch.zeros(6, 0))
    a, b = merge([nothing, *((a.float(), b.float()) for a, b in parts), nothing], 0.1)
    assert a.dtype == torch.float64
    exact = [(a.float().double(), b.float().double()) for a, b in parts]
    assert apart(b @ a, dense_optimum(exact, 0.1)) < 1e-12


@pytest.mark.parametrize("name", golden_names("many_closed_form"))
def test_golden(name: str) -> None:
    case, tensors = load("many_closed_form", name)
    merged = MergedWeight.empty(
        case["config"]["in_features"], case["config"]["out_features"], case["config"]["rho"]
    )
    for task, wanted in enumerate(tensors["out.W_after_each_task"]):
        merged = merged.add(tensors[f"in.A{task}"], tensors[f"in.B{task}"])
        a, b = merged.factors()
        torch.testing.assert_close(b @ a, wanted, rtol=1e-9, atol=1e-10)


def test_all_golden_cases_are_used() -> None:
    assert_complete("many_closed_form", {"a", "b", "dup"})


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"rho must be positive, got 0"):
        MergedWeight.empty(4, 4, 0.0)
    with pytest.raises(ValueError, match=r"parts must hold at least one pair of factors, got none"):
        merge([], 1.0)
    with pytest.raises(ValueError, match=r"a and b must be \[r, 4\] and \[5, r\], got \[2, 3\] and \[5, 2\]"):
        MergedWeight.empty(4, 5, 1.0).add(torch.zeros(2, 3), torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"a and b must be .* got \[2, 4\] and \[5, 3\]"):
        MergedWeight.empty(4, 5, 1.0).add(torch.zeros(2, 4), torch.zeros(5, 3))
