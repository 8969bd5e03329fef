"""The GPU command's bookkeeping with harmless parts, and the tile tuner's without a GPU."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import parts, timing
from benchmarks.__main__ import main
from benchmarks.cases import Case
from benchmarks.problem import make
from benchmarks.programs import gpu, sanitize, tune
from benchmarks.programs.gpu import Part


def python(code: str, **options: object) -> Part:
    """A part that runs some Python."""
    return Part("part", (sys.executable, "-c", code), 5.0, **options)  # type: ignore[arg-type]


def test_parts_end_as_they_end(tmp_path: Path) -> None:
    log = tmp_path / "gpu.log"
    good = gpu.run(python("print('figures')"), 5.0, log)
    bad = gpu.run(python("import sys; print('why'); sys.exit(3)"), 5.0, log)
    slow = gpu.run(python("import time; print('begun', flush=True); time.sleep(60)"), 1.5, log)
    absent = gpu.run(python("", missing="no such tool"), 5.0, log)
    assert [end.status for end in (good, bad, slow, absent)] == [
        "ok",
        "failed (exit code 3)",
        "out of time",
        "skipped: no such tool",
    ]
    assert good.tail[-1] == "figures" and bad.tail[-1] == "why" and slow.tail[-1] == "begun"
    assert slow.seconds < 10
    shown = "\n".join(gpu.summary([good, bad, slow, absent], tmp_path))
    assert "why" in shown and "begun" in shown and "figures" not in shown


def test_parts_know_when_to_stop(tmp_path: Path) -> None:
    part = Part("part", (sys.executable, "-c", "import sys; print(sys.argv[1])", "{seconds}"), 5.0)
    assert gpu.run(part, 65.0, tmp_path / "log").tail[-1] == f"{65 - gpu.LAST_CASE_SECONDS:.0f}"


def test_parts_see_their_environment(tmp_path: Path) -> None:
    part = python("import os; print(os.environ['SOME'], os.environ['OUT'])", environment={"SOME": "value"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OUT", "folder")
        assert gpu.run(part, 5.0, tmp_path / "log").tail[-1] == "value folder"


def test_main_runs_all_parts_and_fails_if_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [python("print(1)"), python("raise SystemExit(2)"), python("print(3)")]
    monkeypatch.setattr(gpu, "parts", lambda device, out: chosen)
    assert gpu.main(["--out", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert shown.count("part ") >= 3 and "failed (exit code 2)" in shown
    assert (tmp_path / "summary.txt").read_text().strip() in shown
    chosen.pop(1)
    assert gpu.main(["--out", str(tmp_path)]) == 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_shares_fit_into_ten_minutes(device: str, tmp_path: Path) -> None:
    chosen = gpu.parts(torch.device(device), tmp_path)
    assert [part.name for part in chosen] == [
        "build",
        "tests",
        "memcheck",
        "racecheck",
        "benchmark",
        "penalty",
        "tiles",
    ]
    assert sum(part.seconds for part in chosen) <= 600 and gpu.TOTAL_SECONDS < 600
    assert ("--toy" in chosen[4].command) == (device == "cpu")


@pytest.mark.gpu
def test_a_graph_calls_every_set() -> None:
    device = torch.device("cuda")
    totals = [torch.zeros(4, device=device) for _ in range(3)]
    made = timing.sampler([lambda t=t: t.add_(1.0) for t in totals], device, captured=True)
    before = [total.clone() for total in totals]
    made.run()
    torch.cuda.synchronize()
    assert (made.mode, made.calls) == ("graph", 3)
    assert all(torch.equal(total, old + 1) for total, old in zip(totals, before, strict=True))


@pytest.mark.gpu
def test_toy_suite_on_the_gpu(tmp_path: Path) -> None:
    assert main(["--toy", "--device", "cuda", "--out", str(tmp_path)]) == 0
    cells = json.loads((tmp_path / "results.json").read_text())["cases"]
    failed = {
        f"{cell['name']} {name}": row["failed"]
        for cell in cells
        for name, row in cell["rows"].items()
        if "failed" in row and name != "grouped"  # a library's own limits are no fault of ours
    }
    assert not failed
    modes = {row["mode"] for cell in cells for name, row in cell["rows"].items() if "mode" in row}
    assert modes == {"graph", "eager"}


@pytest.mark.gpu
def test_a_tile_is_tried(tmp_path: Path) -> None:
    case = Case("expand", "toy", "q", "toy", 64, 1, "bfloat16")
    device = torch.device("cuda")
    tile = parts.shipped_tile(make(case, device))
    (row,) = tune.measure(case, device, [tile])
    assert row["median_us"] > 0 and row["error"] < 2e-2


def test_sanitised_checks_pass_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert sanitize.main(["--device", "cpu"]) == 0
    assert "checks passed on cpu" in capsys.readouterr().out


def test_sanitised_checks_report_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("misaligned address")

    monkeypatch.setattr(sanitize, "passed", broken)
    assert sanitize.main(["--device", "cpu"]) == 1
    assert "FAILED decode/toy.k/toy/T1/float32 cram cpu: misaligned address" in capsys.readouterr().out


def test_tiles_to_try_are_the_shipped_one_and_the_grid() -> None:
    tiles = pytest.importorskip("cram_kernels.expert_lora.tiles")
    kinds = {"shrink": tiles.ShrinkTile, "expand": tiles.ExpandTile, "gram": tiles.GramTile}
    for op, spaces in tune.SPACES.items():
        for space in spaces:
            assert list(space) == [field.name for field in dataclasses.fields(kinds[op])]
    shipped = tiles.expand_tile(90, torch.bfloat16, 8192)
    case = next(case for case in tune.SHAPES if case.op == "expand" and case.tokens == 8192)
    found = tune.candidates(case, shipped)
    assert found[0] == shipped and len(set(found)) == len(found) > 20


def test_tile_summary_puts_the_fastest_beside_the_shipped() -> None:
    rows = [
        {"tile": {"warps": 4}, "median_us": 3.0},
        {"tile": {"warps": 8}, "failed": "out of shared memory"},
        {"tile": {"warps": 2}, "median_us": 2.0},
    ]
    found = tune.summary(tune.SHAPES[0], rows)
    assert found["best"] == rows[2] and found["shipped"] == rows[0] and found["tried"] == 3
    assert tune.line(found).endswith("shipped 3 µs, best 2 µs (2,) of 3")
    assert tune.line(tune.summary(tune.SHAPES[0], rows[1:2])).endswith("no tile ran")


def test_tuning_without_a_gpu_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert tune.main(["--out", str(tmp_path)]) == 0
    assert "no CUDA device" in capsys.readouterr().out
