"""orthonormal_basis: rank, scale, borders, and a basis that grows expert by expert."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cram_kernels import orthonormal_basis


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("rows", "rank", "columns"), [(24, 5, 5), (24, 5, 12), (8, 8, 20), (8, 1, 1), (8, 0, 3)]
)
def test_basis_reveals_rank(rows: int, rank: int, columns: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    span = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    mix = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
    mix[:, :rank] += 4 * torch.eye(rank, dtype=torch.float64)
    matrix = (span @ mix).to(dtype)
    q = orthonormal_basis(matrix)
    assert q.shape == (rows, rank) and q.dtype == dtype
    torch.testing.assert_close(q.t() @ q, torch.eye(rank, dtype=dtype))
    torch.testing.assert_close(q @ (q.t() @ matrix), matrix)


def test_basis_ignores_column_scale() -> None:
    """A small old expert is protected like a large one; a column of zeros adds nothing."""
    columns = torch.randn(32, 4) * torch.tensor([1e4, 1e-6, 0, 1])
    q = orthonormal_basis(columns)
    assert q.shape == (32, 3)
    lost = (columns - q @ (q.t() @ columns)).norm(dim=0)
    assert (lost <= 1e-6 * columns.norm(dim=0)).all()


def test_basis_borders() -> None:
    assert orthonormal_basis(torch.zeros(8, 0)).shape == (8, 0)
    assert orthonormal_basis(torch.zeros(0, 3)).shape == (0, 0)
    repeated = torch.randn(16, 3).bfloat16().repeat(1, 2)
    assert orthonormal_basis(repeated).shape == (16, 3)
    assert orthonormal_basis(repeated).dtype == torch.float32
    assert orthonormal_basis(torch.randn(1024, 9).bfloat16()).shape == (1024, 9)
    assert not orthonormal_basis(torch.randn(4, 2, requires_grad=True)).requires_grad
    with pytest.raises(ValueError, match=r"columns must be \[D, k\], got \[3\]"):
        orthonormal_basis(torch.zeros(3))


def grown(experts: list[Tensor]) -> Tensor:
    """The basis after one expert at a time."""
    basis = None
    for columns in experts:
        basis = orthonormal_basis(columns, basis)
    assert basis is not None
    return basis


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_orthonormal(q: Tensor) -> None:
    """Float32: one rounding of exact columns; float64: what a decomposition of D rows may err."""
    eye = torch.eye(q.shape[1], dtype=torch.float64)
    limit = torch.finfo(q.dtype).eps * (len(q) if q.dtype == torch.float64 else 1)
    assert (q.double().t() @ q.double() - eye).abs().max() <= limit


def same_span(p: Tensor, q: Tensor) -> bool:
    """Whether two bases span one space, up to their rounding."""
    p, q = p.double(), q.double()
    apart = (p - q @ (q.t() @ p)).norm(dim=0).max()
    return p.shape == q.shape and bool(apart <= p.shape[1] * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grown_basis_spans_what_the_whole_does(dtype: torch.dtype) -> None:
    experts = [draw(64, rank, seed=rank).to(dtype) for rank in (5, 1, 0, 9, 4)]
    q = grown(experts)
    assert q.shape == (64, 19) and q.dtype == torch.float32
    assert_orthonormal(q)
    assert same_span(q, orthonormal_basis(torch.cat(experts, 1)))


def test_growing_leaves_the_held_columns_alone() -> None:
    first = orthonormal_basis(draw(32, 4).float())
    second = orthonormal_basis(draw(32, 3, seed=1).float(), first)
    assert torch.equal(second[:, :4], first) and second.shape == (32, 7)
    assert torch.equal(orthonormal_basis(torch.zeros(32, 0), first), first)
    assert second.t().is_contiguous() and first.t().is_contiguous()


@pytest.mark.parametrize("apart", [1e-1, 1e-2, 1e-3])
def test_nearly_dependent_experts(apart: float) -> None:
    """New columns that differ from held ones by little: what they add is found to full precision."""
    old, noise = draw(256, 6), draw(256, 6, seed=1)
    held = orthonormal_basis(old)
    direction = orthonormal_basis(noise - held @ (held.t() @ noise))
    new = held @ orthonormal_basis(draw(6, 6, seed=2)) + apart * direction
    q = grown([old, new])
    assert q.shape == (256, 12)
    assert_orthonormal(q)
    assert same_span(q, torch.cat([held, direction], 1))
    half = grown([old.float(), new.float()])
    assert_orthonormal(half)
    assert half.shape == (256, 12)


def test_a_direction_near_rounding_is_still_orthogonal_to_the_held_columns() -> None:
    """Two new columns that nearly agree: their difference carries the projections' rounding enlarged."""
    held, new = orthonormal_basis(draw(64, 6)), draw(64, 1, seed=1)
    q = orthonormal_basis(torch.cat([new, new + 1e-11 * draw(64, 1, seed=2)], 1), held)
    assert q.shape == (64, 8)
    assert_orthonormal(q)


def test_dependent_experts_add_nothing() -> None:
    old = draw(128, 6).float()
    held = orthonormal_basis(old)
    assert torch.equal(orthonormal_basis(old @ torch.randn(6, 4), held), held)
    assert torch.equal(orthonormal_basis(old * 1e-4, held), held)
    mixed = torch.cat([old[:, :2] @ torch.randn(2, 2), draw(128, 1, seed=3).float()], 1)
    assert orthonormal_basis(mixed, held).shape == (128, 7)


def test_many_experts_stay_orthonormal_and_end_at_the_full_space() -> None:
    q = grown([(draw(24, 3, seed=i) @ draw(3, 4, seed=i + 50)).float() for i in range(12)])
    assert q.shape == (24, 24)
    assert_orthonormal(q)
    assert torch.equal(orthonormal_basis(draw(24, 5).float(), q), q)


def test_extension_refuses_another_width() -> None:
    with pytest.raises(ValueError, match=r"basis must be \[8, m\], got \[7, 2\]"):
        orthonormal_basis(torch.zeros(8, 3), torch.zeros(7, 2))
