"""The README's speed table is what the committed results say."""

from __future__ import annotations

import json

import pytest

from benchmarks.machine import ROOT
from benchmarks.programs import readme


def test_the_readme_shows_committed_results() -> None:
    text = readme.README.read_text()
    files = sorted((ROOT / "benchmarks/results").glob("*/results.json"))
    sections = [readme.section(json.loads(file.read_text())) for file in files]
    assert any(readme.replaced(text, section) == text for section in sections)


def test_only_the_part_between_the_markers_is_replaced() -> None:
    text = f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n"
    assert readme.replaced(text, ["new", "lines"]) == text.replace("old", "new\nlines")


def test_missing_markers_are_refused() -> None:
    with pytest.raises(ValueError, match="must hold"):
        readme.replaced("no marker\n", ["new"])
