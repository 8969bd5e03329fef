"""The README's speed table is what the committed results say."""

from __future__ import annotations

import json

from benchmarks import markdown
from benchmarks.machine import ROOT
from benchmarks.programs import readme


def test_the_readme_shows_committed_results() -> None:
    text = readme.README.read_text()
    files = sorted((ROOT / "benchmarks/results").glob("*/results.json"))
    sections = [readme.section(json.loads(file.read_text())) for file in files]
    assert any(markdown.replaced(text, readme.MARKER, section) == text for section in sections)
