"""Tables have one line for each row, and as many cells as columns."""

from __future__ import annotations

import pytest

from benchmarks import markdown


def test_a_table() -> None:
    assert markdown.table(["a", "b"], [["1", "2"]]) == ["| a | b |", "|---|---|", "| 1 | 2 |"]


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a row must have 2 cells, got \['1'\]"):
        markdown.table(["a", "b"], [["1"]])
