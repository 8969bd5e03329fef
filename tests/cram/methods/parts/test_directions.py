"""Directions of the input space against matrices whose singular vectors are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cram.methods.parts.directions import missing_directions, outside, top_directions


def random(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(rows: Tensor) -> None:
    torch.testing.assert_close(rows @ rows.mT, torch.eye(len(rows), dtype=rows.dtype), atol=1e-5, rtol=0)


def test_top_directions_are_left_singular_vectors() -> None:
    left, right = torch.linalg.qr(random(20, 20))[0], torch.linalg.qr(random(12, 12, seed=1))[0]
    values = 2.0 ** -torch.arange(12, dtype=torch.float64)
    matrix = left[:, :12] * values @ right.mT
    rows = top_directions(matrix, 3)
    orthonormal(rows)
    torch.testing.assert_close((rows @ left[:, :3]).abs(), torch.eye(3, dtype=rows.dtype), atol=1e-6, rtol=0)
    few = top_directions(matrix, 15)
    orthonormal(few[:12])
    assert not few[12:].any()


def test_the_rest_lies_outside_of_the_space() -> None:
    gradient, space = random(6, 10), torch.linalg.qr(random(10, 4, seed=1))[0].mT
    rest = outside(gradient, space)
    assert (space @ rest).abs().max() < 1e-12
    torch.testing.assert_close(rest, gradient.mT - space.mT @ space @ gradient.mT)


def weight_of(energies: list[float], size: int = 8) -> tuple[Tensor, Tensor]:
    """A weight whose directions hold these shares of the energy, and the directions [size, size] as rows."""
    rows = torch.linalg.qr(random(size, size, seed=2))[0].mT
    values = torch.tensor(energies + [0.0] * (size - len(energies)), dtype=torch.float64).sqrt()
    return torch.linalg.qr(random(size, size, seed=3))[0] @ (values[:, None] * rows), rows


@pytest.mark.parametrize(
    ("held", "energy", "count"),
    [(0, 0.99, 4), (0, 0.6, 2), (0, 0.4, 1), (1, 0.6, 1), (2, 0.6, 0), (1, 0.99, 3)],
)
def test_directions_are_added_until_the_energy_is_held(held: int, energy: float, count: int) -> None:
    weight, rows = weight_of([0.5, 0.3, 0.15, 0.05])
    fresh = missing_directions(weight, rows[:held], energy)
    assert len(fresh) == count
    orthonormal(torch.cat([rows[:held], fresh]))
    wanted = rows[held : held + count]
    torch.testing.assert_close(
        (fresh @ wanted.mT).abs(), torch.eye(count, dtype=fresh.dtype), atol=1e-6, rtol=0
    )


def test_the_bases_own_directions_stop_below_the_energy() -> None:
    weight, rows = weight_of([0.5, 0.3, 0.15, 0.05])
    assert [len(missing_directions(weight, rows[:0], share, below=True)) for share in (0.4, 0.6, 0.9)] == [
        1,
        1,
        2,
    ]
    assert not len(missing_directions(torch.zeros(4, 4), torch.zeros(0, 4), 1e-9)[:, :0].mT)
