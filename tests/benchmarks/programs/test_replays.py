"""Replays on new inputs: right ones count as right, and what lags one replay behind counts as wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.programs import replays

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.fixture(autouse=True)
def _interpreter() -> None:
    pytest.importorskip("triton")


def test_every_kind_is_right_on_new_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replays.main(["--toy", "--replays", "2", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "replays.json").read_text())["rows"]
    assert [(row["kind"], row["wrong"], row["of"]) for row in rows] == [
        (kind, 0, 2) for kind in replays.KINDS
    ]
    assert all(0 < row["largest_error"] < 1e-4 for row in rows)
    assert "expert_lora T 16: 0 wrong replays of 2" in capsys.readouterr().out


def late(steps: Sequence[Callable[[], Any]], device: torch.device) -> Callable[[], list[Any]]:
    """A graph whose last launch reads what the replay before has left."""
    steps = [torch.no_grad()(step) for step in steps]
    kept = [step() for step in steps]

    def replay() -> list[Any]:
        found, kept[:] = list(kept), [step() for step in steps]
        return found

    return replay


def test_a_value_of_the_last_replay_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replays, "captured", late)
    assert replays.main(["--toy", "--replays", "2", "--out", str(tmp_path)]) == 1
    rows = json.loads((tmp_path / "replays.json").read_text())["rows"]
    assert all(row["wrong"] == row["of"] == 2 for row in rows)


def test_inputs_are_new() -> None:
    (p, other) = replays.problems("routed_expert_lora", "toy", 16, torch.device("cpu"))
    before = p.x.clone(), p.gates.clone(), p.query.clone()
    replays.renew(p)
    assert all(not torch.equal(old, new) for old, new in zip(before, (p.x, p.gates, p.query), strict=True))
    torch.testing.assert_close(p.gates.sum(-1), torch.ones(16))
    assert not torch.equal(p.x, other.x)
