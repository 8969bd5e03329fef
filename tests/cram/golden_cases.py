"""Golden vectors of one family as test parameters, with a check that no case of the family is forgotten."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
from torch import Tensor

from tests.conftest import golden_case, golden_cases, golden_dir


def family_names(family: str) -> list[str]:
    """Names of a family's cases without the family's prefix; empty if the vectors are absent."""
    return [case["id"].removeprefix(f"{family}__") for case in golden_cases(family)]


def golden_names(family: str, left_out: Collection[str] = ()) -> list[Any]:
    """Parameters for ``pytest.mark.parametrize``: the family's cases except those left out."""
    names = [name for name in family_names(family) if name not in left_out]
    return names or [pytest.param("absent", marks=pytest.mark.skip(reason="golden vectors are absent"))]


def assert_complete(family: str, expected: Collection[str], left_out: Collection[str] = ()) -> None:
    """Every case of the family is either expected by a test or left out by name, and none is missing."""
    golden_dir()
    assert set(expected).isdisjoint(left_out)
    assert set(expected) | set(left_out) == set(family_names(family))


def load(family: str, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The index entry and the tensors of one case."""
    return golden_case(f"{family}__{name}")
