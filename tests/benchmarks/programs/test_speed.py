"""The table of docs/speed.md is what the committed results say."""

from __future__ import annotations

import json

from benchmarks import markdown
from benchmarks.machine import ROOT
from benchmarks.programs import speed


def test_the_page_shows_committed_results() -> None:
    text = speed.PAGE.read_text()
    files = sorted((ROOT / "benchmarks/results").glob("*/results.json"))
    sections = [speed.section(json.loads(file.read_text())) for file in files]
    assert any(markdown.replaced(text, speed.MARKER, section) == text for section in sections)


def test_the_page_shows_all_processors() -> None:
    text = speed.PAGE.read_text()
    assert markdown.replaced(text, speed.ACROSS, speed.processors()) == text
