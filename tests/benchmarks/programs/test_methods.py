"""Every registered method's layer is measured, at equal rank and on the base's own weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.models import random_llava
from benchmarks.programs import methods
from cram.methods import METHODS

CPU = torch.device("cpu")


def test_every_method_is_measured_against_cram(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert methods.main(["--toy", "--device", "cpu", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "methods.json").read_text())
    assert [cell["case"]["op"] for cell in found["cases"]] == ["train", "prompt", "decode"]
    for cell in found["cases"]:
        assert cell["rows"].keys() == METHODS.keys() and next(iter(cell["rows"])) == "cram"
        assert cell["rows"]["cram"]["over_cram"] == 1.0
        assert all(row["median_us"] > 0 for row in cell["rows"].values())
    page = (tmp_path / "methods.md").read_text()
    assert capsys.readouterr().out.endswith(page)
    assert "Goal: at most 1.3 x, in training from 64 tokens on. Worst: " in page


@pytest.mark.parametrize("name", METHODS)
def test_the_last_task_is_in_training_at_equal_rank(name: str) -> None:
    base = random_llava(methods.SHAPES["toy"], CPU, torch.float32, samples=1).model
    weights = {p.data_ptr() for p in base.parameters()}
    model = methods.grown(base, name, CPU)
    assert weights <= {p.data_ptr() for p in model.parameters()}
    for module in model.cram.modules.values():
        assert module.trainable()
        total = (len(module.experts.a) + len(module.experts.bt)) / 2
        assert total == pytest.approx(methods.TASKS * methods.ROWS, rel=0.15)
    for step in methods.layer_steps(model, "train", 8, torch.float32):
        found = [t for t in step() if t is not None]
        assert len(found) >= 2 and all(torch.isfinite(t).all() for t in found)


@pytest.mark.parametrize("name", METHODS)
def test_a_decode_step_answers_a_token_of_each_sample(name: str) -> None:
    base = random_llava(methods.SHAPES["toy"], CPU, torch.float32, samples=1).model
    model = methods.grown(base, name, CPU)
    model.cram.method.end_task()
    for kind, samples, length in (("decode", 3, 1), ("prompt", 1, 3)):
        for step in methods.layer_steps(model, kind, 3, torch.float32):
            assert step().shape == (samples, length, 64) and model.cram.state.decoding == (kind == "decode")


def test_a_missed_goal_is_said() -> None:
    row = {"median_us": 1.0, "over_cram": 1.0}
    rows = {"cram": row, "slow": {"median_us": 2.0, "over_cram": 2.0}}
    cell = {"name": "methods/prompt/x", "case": {"op": "prompt", "tokens": 64}, "rows": rows}
    small = {"name": "methods/train/x", "case": {"op": "train", "tokens": 8}}
    small["rows"] = {"cram": row, "slow": {"median_us": 9.0, "over_cram": 9.0}}
    environment = {"machine": "m", "cpu": "c", "threads": 1, "commit": "0", "load": 0.0, "load_after": 0.0}
    page = "\n".join(methods.lines({"environment": environment, "cases": [cell, small]}))
    assert "Worst: 2.00 x, slow, methods/prompt/x: **missed**" in page
    cell["rows"]["slow"]["over_cram"] = 1.2
    assert "1.20 x, slow, methods/prompt/x: holds" in "\n".join(
        methods.lines({"environment": environment, "cases": [cell, small]})
    )
