"""The experiments at toy size; a way that computes something else is not timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.problem import make
from benchmarks.programs import experiments
from benchmarks.programs.experiments import Way

CPU = torch.device("cpu")


def test_every_way_runs(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert experiments.main(["--toy", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "experiments.json").read_text())["rows"]
    assert {row["name"] for row in rows} == set(experiments.WAYS)
    for row in rows:
        way = experiments.WAYS[row["name"]]
        assert "skipped" in row if way.needs_cuda else row["median_us"] > 0
        assert ("error" in row) == (way.expected is not None and not way.needs_cuda)


def test_a_wrong_way_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Way(lambda p: lambda: p.x @ p.weight, experiments.base_alone)
    breaks = Way(lambda p: lambda: p.x @ p.x, experiments.base_alone)
    monkeypatch.setattr(experiments, "WAYS", {"wrong": wrong, "breaks": breaks})
    rows = experiments.measure("toy", 32, experiments.PROMPT[0], CPU)
    assert [row["name"] for row in rows] == ["wrong", "breaks"]
    assert rows[0]["failed"].startswith("y must be within") and "median_us" not in rows[0]
    assert "failed" in rows[1]


def test_the_same_sum_in_every_order() -> None:
    p = make(experiments.case_of("toy", 96), CPU)
    expected = experiments.base_and_experts(p)
    ways = [experiments.base_then_expand(p), experiments.expand_then_base(p), experiments.in_chunks(p, 40)]
    for step in ways:
        torch.testing.assert_close(step().double(), expected, rtol=1e-4, atol=1e-5)
