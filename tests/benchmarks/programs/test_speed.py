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


def test_a_full_grid_gives_each_row_once() -> None:
    results = [json.loads(file.read_text()) for file in speed.RESULTS.glob("*/results.json")]
    full = [each for each in results if each["suite"] == "full"]
    tables = [
        [line.split("|")[1:4] for line in speed.section(each) if line.startswith("| ")] for each in full
    ]
    assert max(map(len, tables)) > 10
    for rows in tables:
        assert len(rows) == len({tuple(row) for row in rows})
