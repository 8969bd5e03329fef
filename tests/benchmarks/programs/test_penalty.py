"""The penalty's program: which implementations it takes on a device, and its figures at toy size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.programs import penalty
from cram_kernels import native_libraries


def test_candidates_are_those_of_the_device() -> None:
    """The CPU library says nothing about CUDA tensors."""
    libraries = native_libraries()
    for name in ("cpu", "cuda"):
        expected = ["cpu", "reference"] if libraries[name] else ["native", "cpu", "reference"]
        assert penalty.candidates(torch.device(name)) == expected


def test_every_candidate_has_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert penalty.main(["--toy", "--repeats", "1", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "penalty.json").read_text())["rows"]
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows
    names = [row["candidate"] for row in rows]
    assert names == [*penalty.candidates(torch.device("cpu")), "released", "byte floor"]
    assert all(row["median_ms"] > 0 and row["modules"] == 3 for row in rows)


def test_a_wrong_candidate_is_refused() -> None:
    model = penalty.draw_model(2, 80, torch.device("cpu"))
    other = penalty.draw_model(3, 80, torch.device("cpu"))
    reference = penalty.grouped(model, "reference")
    wrong = penalty.grouped(
        penalty.Model(model.hidden, model.a, model.bt, other.bases[1:], model.gamma), "cpu"
    )
    penalty.check("same", penalty.grouped(model, "cpu"), reference)
    with pytest.raises(ValueError, match="wrong must agree with float64"):
        penalty.check("wrong", wrong, reference)
