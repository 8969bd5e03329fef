"""Predictions read their figures out of results, and the notes show the table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import markdown, predictions
from benchmarks.machine import ROOT
from benchmarks.programs import predictions as program


def by_question(start: str) -> predictions.Prediction:
    """The one prediction whose question begins so."""
    (found,) = [p for p in predictions.PREDICTIONS if p.question.startswith(start)]
    return found


def layer(name: str, **us: float) -> dict[str, Any]:
    """Results of one case."""
    rows = {key.replace("_", " "): {"median_us": value} for key, value in us.items()}
    return {"results": {"environment": {"device": "cuda"}, "cases": [{"name": name, "rows": rows}]}}


def test_the_notes_show_the_predictions() -> None:
    text = program.NOTES.read_text()
    assert markdown.replaced(text, program.MARKER, predictions.table()) == text


@pytest.mark.parametrize(
    ("question", "found", "value", "holds"),
    [
        (
            "forward of one linear",
            layer("forward/LLaVA-1.5-7B.q/trigap/T8192/bfloat16", base=100.0, cram_triton=112.0),
            0.12,
            True,
        ),
        (
            "training step",
            layer("train/LLaVA-1.5-7B.q/trigap/T8192/bfloat16", base=100.0, cram_triton=130.0),
            1.3,
            False,
        ),
        ("SHRINK, T 8192", layer("shrink/LLaVA-1.5-7B.q/trigap/T8192/bfloat16", triton=25.0), 25.0, False),
        (
            "W and A in one launch, over the layer, T 16",
            {
                "experiments": {
                    "rows": [
                        {"name": "layer", "tokens": 16, "median_us": 10.0},
                        {"name": "layer, base first", "tokens": 16, "median_us": 1.0},
                        {"name": "layer, W and A in one launch, split 1", "tokens": 16, "median_us": 30.0},
                        {"name": "layer, W and A in one launch, split 2", "tokens": 16, "median_us": 9.5},
                        {"name": "layer, W and A in one launch, split 4", "tokens": 16, "failed": "why"},
                    ]
                }
            },
            0.95,
            True,
        ),
        ("captured decode", {"replays": {"rows": [{"wrong": 0}, {"wrong": 2}]}}, 2.0, False),
        (
            "penalty",
            {
                "penalty": {
                    "rows": [
                        {"candidate": n, "median_ms": t} for n, t in (("native", 4.0), ("byte floor", 2.0))
                    ]
                }
            },
            2.0,
            True,
        ),
        (
            "decode over the bare",
            {"e2e-7b": {"rows": {"bare": {"token_us": 9.0}, "cram": {"token_us": 10.0}}}},
            0.9,
            True,
        ),
    ],
)
def test_figures_are_found(question: str, found: dict[str, Any], value: float, holds: bool) -> None:
    prediction = by_question(question)
    measured = prediction.measure(found)
    assert measured == pytest.approx(value) and prediction.holds(measured) == holds
    assert prediction.measure({}) is None
    lines = predictions.verdicts(found)
    word = "held  " if holds else "MISSED"
    assert [line for line in lines if line.startswith(f"{word} {prediction.question}")]
    assert lines[-1].endswith(f"of {len(predictions.PREDICTIONS)} predictions have no figure")


@pytest.mark.parametrize("prediction", predictions.PREDICTIONS, ids=lambda p: p.question)
def test_every_prediction_can_fail(prediction: predictions.Prediction) -> None:
    bounds = [bound for bound in (prediction.least, prediction.most) if bound is not None]
    assert bounds and all(prediction.holds(bound) for bound in bounds)
    assert not prediction.holds(float("inf")) or not prediction.holds(float("-inf"))
    assert not prediction.measure({})


def test_figures_of_a_cpu_do_not_count(tmp_path: Path) -> None:
    for name, device in (("replays", "cpu"), ("penalty", "cuda")):
        found = {"environment": {"device": device}, "rows": []}
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    assert list(predictions.load(tmp_path)) == ["penalty"]


def test_no_bound_by_bytes_is_above_the_prediction() -> None:
    for p in predictions.PREDICTIONS:
        if p.show is predictions._us and p.bytes_us is not None and p.most is not None:
            assert max(p.bytes_us, p.issue_us or 0.0) < p.most, p.question


@pytest.mark.slow
def test_bounds_by_issue_are_those_of_the_compiled_kernels() -> None:
    """Releases of Triton differ by a tenth; a kernel that gates in its inner loop, by a factor."""
    pytest.importorskip("triton")
    settings = {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.benchmarks.issue", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for p in predictions.PREDICTIONS:
        if p.case is not None and p.issue_us is not None:
            assert p.issue_us == pytest.approx(found[p.case.name], rel=0.15), p.question
