"""TRL's SFTTrainer on `messages` and `images`: the example that learns two tasks."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from cram import load
from cram.loading import Sources

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
pytest.importorskip("trl", reason="trl is absent: pip install trl in an environment of its own")
pytest.importorskip("datasets", reason="datasets is absent; trl needs it")
EXAMPLE = Path(__file__).resolve().parents[3] / "examples/sft.py"


def test_two_tasks_by_sft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = runpy.run_path(str(EXAMPLE))["main"](tmp_path, 5)
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 5 and all(entry["cross_entropy"] > 0 for entry in steps)
    assert steps[-1]["loss"] < steps[0]["loss"]
    names = trainer.model.cram.expert_names
    assert list(trainer.model.cram.method.expert_groups()) == names and len(names) == 2
    assert all(f"{name}: " in capsys.readouterr().out for name in names[:1])
    again, _, encoder = Sources("builtin").load("cpu")
    assert load(again, tmp_path / "bundle", encoder).expert_names == names
