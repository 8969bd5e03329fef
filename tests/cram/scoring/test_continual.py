"""Continual metrics against hand-computed numbers and the golden vectors."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cram.scoring.continual import DEFINITIONS, continual_metrics
from tests.conftest import golden_case, golden_cases

OWN_NAMES = {
    "last": "Last_or_MFN",
    "mft": "MFT",
    "avg": "MAA",
    "bwt": "BWT",
    "forgetting": "forgetting_max_over_steps_before_last",
}


def rows_of(tensors: dict[str, Any]) -> list[list[float]]:
    square = tensors["in.accuracy_lower_triangular"].tolist()
    return [row[: t + 1] for t, row in enumerate(square)]


@pytest.mark.parametrize("case_id", [case["id"] for case in golden_cases("cl_metrics")])
def test_golden_metrics(case_id: str) -> None:
    entry, tensors = golden_case(case_id)
    found = continual_metrics(rows_of(tensors)).to_dict()
    expected = entry["expected"]
    for name, golden_name in OWN_NAMES.items():
        assert found[name] == pytest.approx(expected["own_reading"][golden_name], abs=1e-10)
    assert found["bwt"] == pytest.approx(expected["mammoth"]["backward_transfer"], abs=1e-10)


@pytest.mark.parametrize("case_id", [case["id"] for case in golden_cases("cl_metrics")])
def test_forgetting_differs_from_mammoth_only_where_a_task_ends_above_its_best(case_id: str) -> None:
    entry, tensors = golden_case(case_id)
    rows = rows_of(tensors)
    final, old = rows[-1], range(len(rows) - 1)
    over_all_steps = [max(row[i] for row in rows[i:]) - final[i] for i in old]
    before_the_last = [max(row[i] for row in rows[i:-1]) - final[i] for i in old]
    mammoth = entry["expected"]["mammoth"]["forgetting"]
    assert sum(over_all_steps) / len(over_all_steps) == pytest.approx(mammoth, abs=1e-10)
    differs = abs(continual_metrics(rows).forgetting - mammoth) > 1e-10
    assert differs == any(value < 0 for value in before_the_last)


def test_hand_computed_matrix() -> None:
    metrics = continual_metrics([[80.0], [60.0, 90.0], [50.0, 100.0, 70.0]])
    assert metrics.last == pytest.approx(220 / 3)
    assert metrics.avg == pytest.approx((80 + 75 + 220 / 3) / 3)
    assert metrics.mft == pytest.approx(80.0)
    assert metrics.bwt == pytest.approx((-30 + 10) / 2)
    assert metrics.forgetting == pytest.approx((30 - 10) / 2)
    assert metrics.to_dict().keys() == DEFINITIONS.keys()


def test_single_task_has_no_transfer_and_no_forgetting() -> None:
    assert continual_metrics([[42.0]]).to_dict() == {
        "last": 42.0,
        "avg": 42.0,
        "mft": 42.0,
        "bwt": 0.0,
        "forgetting": 0.0,
    }


@pytest.mark.parametrize("matrix", [[], [[]], [[1.0, 2.0]], [[1.0], [2.0]], [[1.0], [2.0, 3.0, 4.0]]])
def test_malformed_matrix_is_refused(matrix: list[list[float]]) -> None:
    with pytest.raises(
        ValueError, match=r"matrix must have rows of 1, 2, \.\.\., T accuracies, got row lengths"
    ):
        continual_metrics(matrix)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 6).flatmap(lambda n: st.tuples(*(st.lists(st.floats(0, 100), min_size=t, max_size=t)
                                                       for t in range(1, n + 1)))))  # fmt: skip
def test_forgetting_is_at_least_minus_bwt(rows: tuple[list[float], ...]) -> None:
    metrics = continual_metrics(rows)
    assert metrics.forgetting >= -metrics.bwt - 1e-9
    assert metrics.last == pytest.approx(metrics.mft + metrics.bwt * (len(rows) - 1) / len(rows), abs=1e-9)
