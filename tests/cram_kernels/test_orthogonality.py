"""orthogonality_penalty against a float64 oracle, and the means it is taken of; float64 implementations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cram_kernels import orthogonality_penalty, orthonormal_basis, visual_mean

IMPLS = ("reference", "cpu")
MIXED = ((12, 16, 4, 9), (12, 16, 9, 5), (16, 16, 1, 3), (12, 16, 0, 9), (16, 12, 6, 0), (16, 16, 5, 1))


def modules(
    shapes: tuple[tuple[int, int, int, int], ...] = MIXED, batch: int = 5, dtype: torch.dtype = torch.float64
) -> dict[str, list[Tensor]]:
    """Draw one module per (D_in, D_out, r, k)."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lists: dict[str, list[Tensor]] = {n: [] for n in ("hidden", "trained_a", "trained_b", "bases", "gamma")}
    for d_in, d_out, rank, width in shapes:
        lists["hidden"].append(draw(batch, d_in).to(dtype))
        lists["trained_a"].append((draw(rank, d_in) / d_in**0.5).to(dtype))
        lists["trained_b"].append((draw(rank, d_out) / max(rank, 1) ** 0.5).to(dtype))
        lists["bases"].append(orthonormal_basis(draw(d_out, width)).to(dtype))
        lists["gamma"].append(draw(batch).sigmoid().to(dtype))
    return lists


def oracle(lists: dict[str, list[Tensor]], scale: float) -> Tensor:
    """Sample by sample, with the dense B A."""
    terms = []
    for h, a, bt, q, gamma in zip(*lists.values(), strict=True):
        if q.shape[1]:
            dense = scale * (bt.double().t() @ a.double())
            each = [
                g.double() * (q.double().t() @ dense @ x.double()).square().sum()
                for x, g in zip(h, gamma, strict=True)
            ]
            terms.append(torch.stack(each).mean())
    return torch.stack(terms).mean() if terms else torch.zeros((), dtype=torch.float64)


def leaves(lists: dict[str, list[Tensor]], *names: str) -> list[Tensor]:
    return [tensor.requires_grad_() for name in names for tensor in lists[name]]


@pytest.mark.parametrize("impl", IMPLS)
def test_value_and_gradients(impl: str) -> None:
    lists = modules()
    wanted = leaves(lists, "hidden", "trained_a", "trained_b", "gamma")
    found, expected = orthogonality_penalty(*lists.values(), scale=2.0, impl=impl), oracle(lists, 2.0)
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(loss, wanted, materialize_grads=True) for loss in (found, expected)]
    torch.testing.assert_close(*grads)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    shapes=st.lists(
        st.tuples(st.sampled_from([6, 8]), st.sampled_from([6, 8]), st.integers(0, 6), st.integers(0, 6)),
        max_size=6,
    ),
    batch=st.integers(1, 4),
)
def test_any_shape(shapes: list[tuple[int, int, int, int]], batch: int) -> None:
    lists = modules(tuple(shapes), batch)
    for impl in IMPLS:
        found = orthogonality_penalty(*lists.values(), scale=0.5, impl=impl)
        torch.testing.assert_close(found, oracle(lists, 0.5), check_dtype=bool(shapes))


@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck(impl: str) -> None:
    lists = modules(((3, 4, 2, 2), (3, 4, 1, 1), (4, 4, 2, 3)), batch=2)
    wanted = leaves(lists, "hidden", "trained_a", "trained_b", "gamma")

    def penalty(*_: Tensor) -> Tensor:
        return orthogonality_penalty(*lists.values(), scale=2.0, impl=impl)

    assert torch.autograd.gradcheck(penalty, wanted)


@pytest.mark.parametrize("impl", IMPLS)
def test_runs_are_bitwise_equal_and_inputs_left_alone(impl: str) -> None:
    lists = modules(dtype=torch.float32)
    before = [[t.clone() for t in each] for each in lists.values()]
    first, second = (orthogonality_penalty(*lists.values(), scale=2.0, impl=impl) for _ in range(2))
    assert torch.equal(first, second)
    assert all(
        torch.equal(t, b)
        for each, old in zip(lists.values(), before, strict=True)
        for t, b in zip(each, old, strict=True)
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_accumulation_inside_autocast(dtype: torch.dtype, impl: str) -> None:
    lists = modules(dtype=dtype)
    trained = leaves(lists, "trained_a", "trained_b")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = orthogonality_penalty(*lists.values(), scale=2.0, impl=impl)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), oracle(lists, 2.0), rtol=1e-5, atol=1e-6)
    loss.backward()
    assert all(t.grad is None or t.grad.dtype == dtype for t in trained)


@pytest.mark.parametrize("impl", IMPLS)
def test_modules_without_history_do_not_count(impl: str) -> None:
    with_history = ((8, 8, 3, 2), (8, 8, 4, 5))
    lists = modules((*with_history, (8, 8, 3, 0)))
    alone = modules(with_history)
    losses = [orthogonality_penalty(*each.values(), scale=2.0, impl=impl) for each in (lists, alone)]
    torch.testing.assert_close(*losses)
    assert orthogonality_penalty(*modules(((8, 8, 3, 0),)).values(), scale=2.0, impl=impl) == 0
    assert orthogonality_penalty([], [], [], [], [], scale=2.0, impl=impl) == 0


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gamma_as_one_tensor(dtype: torch.dtype, impl: str) -> None:
    lists = modules((*MIXED, (8, 8, 3, 0)), dtype=dtype)
    rows = lists["gamma"]
    matrix = torch.stack(rows).requires_grad_()
    expected = orthogonality_penalty(
        *(lists | {"gamma": leaves(lists, "gamma")}).values(), scale=2.0, impl=impl
    )
    found = orthogonality_penalty(*(lists | {"gamma": matrix}).values(), scale=2.0, impl=impl)
    assert torch.equal(found, expected)
    grads = torch.autograd.grad(expected, rows, materialize_grads=True)
    assert torch.equal(torch.autograd.grad(found, matrix)[0], torch.stack(grads))


def test_orthogonal_expert_costs_nothing() -> None:
    lists = modules(((8, 8, 3, 4),))
    q = lists["bases"][0]
    lists["trained_b"][0] -= lists["trained_b"][0] @ q @ q.t()
    assert orthogonality_penalty(*lists.values(), scale=2.0) < 1e-28


@pytest.mark.parametrize("name", ["bases", "gamma", "hidden", "trained_a", "trained_b"])
def test_wrong_pairing_is_caught(name: str) -> None:
    """Two modules swapped in one list must change the result."""
    lists = modules(((8, 8, 3, 4), (8, 8, 3, 4)))
    expected = oracle(lists, 2.0)
    wrong = lists | {name: lists[name][::-1]}
    with pytest.raises(AssertionError):
        torch.testing.assert_close(orthogonality_penalty(*wrong.values(), scale=2.0), expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"gamma": []}, r"equally long, got \[1, 1, 1, 1, 0\]"),
        ({"gamma": [torch.zeros(4)]}, r"must fit gamma.*\[4, 12\]"),
        ({"hidden": [torch.zeros(5, 11)]}, "must fit gamma"),
        ({"trained_b": [torch.zeros(3, 16)]}, "must fit gamma"),
        ({"bases": [torch.zeros(12, 3)]}, "must fit gamma"),
        ({"gamma": torch.zeros(1, 4)}, r"must fit gamma.*\[4, 12\]"),
        ({"gamma": torch.zeros(2, 5)}, r"equally long, got \[1, 1, 1, 1, 2\]"),
        ({"gamma": torch.zeros(1)}, r"\[D_out, k\] and \[B\], got"),
        ({"gamma": [torch.zeros(5, 1)]}, r"\[D_out, k\] and \[B\], got"),
        ({"hidden": [torch.zeros(12)]}, r"\[B, D_in\]"),
    ],
)
def test_refusals(changed: dict[str, Any], message: str) -> None:
    lists = modules(MIXED[:1])
    with pytest.raises(ValueError, match=message):
        orthogonality_penalty(*(lists | changed).values(), scale=2.0)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 99), st.booleans())
def test_visual_mean_selects(batch: int, length: int, seed: int, half: bool) -> None:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, 3, generator=rng).to(torch.bfloat16 if half else torch.float32)
    mask = torch.rand(batch, length, generator=rng) < 0.5
    x[~mask] = float("nan")
    mean = visual_mean(x, mask)
    for row in range(batch):
        rows = x[row][mask[row]].float()
        torch.testing.assert_close(mean[row], rows.mean(0) if len(rows) else torch.zeros(3))
    assert mean.dtype == torch.float32


@pytest.mark.parametrize(
    ("x", "mask"),
    [
        (torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)),
        (torch.zeros(2, 3, 4), torch.ones(2, 4, dtype=torch.bool)),
        (torch.zeros(2, 3, 4), torch.ones(2, 3)),
    ],
)
def test_visual_mean_refuses_misfits(x: Tensor, mask: Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be \[B, T, D\] and bool \[B, T\]"):
        visual_mean(x, mask)


@pytest.mark.parametrize("impl", [*IMPLS, "auto"])
def test_no_tokens_and_a_module_without_history(impl: str) -> None:
    """The module that does not count is left out before the tokens of the others are pooled."""
    hidden = [torch.ones(2, 0, width) for width in (8, 5, 3)]
    a = [torch.ones(1, width, requires_grad=True) for width in (8, 5, 3)]
    b = [torch.ones(1, 6, requires_grad=True) for _ in range(3)]
    bases = [torch.eye(6)[:, :2], torch.zeros(6, 0), torch.eye(6)[:, :1]]
    mask = torch.zeros(2, 0, dtype=torch.bool)
    loss = orthogonality_penalty(hidden, a, b, bases, torch.ones(3, 2), scale=2.0, mask=mask, impl=impl)
    assert loss == 0 and loss.requires_grad
    loss.backward()
    assert not a[0].grad.any()


def test_gamma_is_a_matrix_or_a_list() -> None:
    modules = [torch.ones(2, 3)], [torch.ones(1, 3)], [torch.ones(1, 4)], [torch.eye(4)[:, :1]]
    with pytest.raises(ValueError, match=r"gamma must be \[M, B\] or a list of \[B\], got \[\]"):
        orthogonality_penalty(*modules, torch.tensor(1.0), scale=1.0)
