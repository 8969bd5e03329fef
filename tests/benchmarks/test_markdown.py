"""Tables have one line for each row, and as many cells as columns."""

from __future__ import annotations

import pytest

from benchmarks import markdown


def test_a_table() -> None:
    assert markdown.table(["a", "b"], [["1", "2"]]) == ["| a | b |", "|---|---|", "| 1 | 2 |"]


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a row must have 2 cells, got \['1'\]"):
        markdown.table(["a", "b"], [["1"]])


def test_only_the_part_between_the_markers_is_replaced() -> None:
    text = "before\n<!-- speed:begin -->\nold\n<!-- speed:end -->\nafter\n"
    assert markdown.replaced(text, "speed", ["new", "lines"]) == text.replace("old", "new\nlines")


@pytest.mark.parametrize(
    "text", ["no marker\n", "<!-- speed:begin -->\n", "<!-- other:begin -->\n<!-- other:end -->"]
)
def test_missing_markers_are_refused(text: str) -> None:
    with pytest.raises(
        ValueError, match="the document must hold <!-- speed:begin --> and <!-- speed:end -->"
    ):
        markdown.replaced(text, "speed", ["new"])
