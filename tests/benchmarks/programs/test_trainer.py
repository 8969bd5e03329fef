"""The trainer's program: every candidate has a row, and the expert has the LoRA's rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.programs import trainer


@pytest.mark.slow
def test_every_candidate_has_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trainer.main(["--toy", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "trainer.json").read_text())["rows"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('{"candidate"')]
    assert [json.loads(line) for line in lines] == rows
    assert [row["candidate"] for row in rows] == ["peft", "cram, first task", "cram, second task"]
    assert all(row["median_ms"] > 0 for row in rows) and rows[0]["ratio"] == 1
