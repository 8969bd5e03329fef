"""Two results side by side."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from benchmarks.machine import ROOT
from benchmarks.programs import compare

FILE = sorted((ROOT / "benchmarks/results").glob("*avx2-2*/results.json"))[0]


def test_the_same_results_do_not_differ() -> None:
    results = json.loads(FILE.read_text())
    assert "0 faster and 0 slower" in compare.lines(results, results)[-1]


def test_only_a_slower_layer_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = json.loads(FILE.read_text())
    slow, worse = copy.deepcopy(results), copy.deepcopy(results)
    for cell in slow["cases"]:
        for row in cell["rows"].values():
            if "median_us" in row:
                row["median_us"] *= 2
    assert "0 faster and 0 slower" in compare.lines(results, slow)[-1]
    cell = next(cell for cell in worse["cases"] if "cram native" in cell["rows"])
    cell["rows"]["cram native"]["median_us"] *= 2
    (tmp_path / "results.json").write_text(json.dumps(worse))
    assert compare.main([str(FILE), str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "0 faster and 1 slower" in shown and "| 2.00 |" in shown


def test_other_cases_are_said_to_be_others() -> None:
    results = json.loads(FILE.read_text())
    assert compare.lines({**results, "cases": []}, results) == ["no case is in both results"]
