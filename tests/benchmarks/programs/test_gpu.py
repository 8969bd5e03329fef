"""The GPU command's schedule and bookkeeping, with harmless parts; and the harness on a GPU."""

from __future__ import annotations

import json
import re
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from benchmarks import kit, parts, timing
from benchmarks.__main__ import PROGRAMS, main
from benchmarks.cases import Case
from benchmarks.problem import make
from benchmarks.processes import Ended, Part
from benchmarks.programs import gpu, tune

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def python(code: str, name: str = "part", **options: object) -> Part:
    """A part that runs some Python."""
    return Part(name, (sys.executable, "-c", code), 5.0, **options)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _no_archive_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the caller has $OUT set, the command would leave its archives there."""
    monkeypatch.delenv("OUT", raising=False)


@pytest.fixture
def harmless(monkeypatch: pytest.MonkeyPatch) -> list[gpu.Stage]:
    """Stages that take the place of the real ones."""
    chosen: list[gpu.Stage] = []
    monkeypatch.setattr(gpu, "stages", lambda *_: chosen)
    monkeypatch.setattr(gpu, "_prepared", lambda file, out: python("print('prepared')", "prepare"))
    return chosen


def test_all_parts_run_and_one_failure_fails_the_command(
    harmless: list[gpu.Stage], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harmless += [
        (python("print(1)", "one"),),
        (python("raise SystemExit(2)", "two"), python("print(2)", "beside", stub="the hard half")),
        (python("print(3)", "three", shown=True),),
    ]
    assert gpu.main(["--out", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    for name, status in (
        ("prepare", "ok"),
        ("one", "ok"),
        ("two", r"failed \(exit code 2\)"),
        ("three", "ok"),
    ):
        assert re.search(rf"^{name} +\d+ s  {status}$", shown, re.MULTILINE), name
    assert "    left out: the hard half" in shown and "    3\n" in shown
    assert "predictions have no figure" in shown and "no kit (kit.tgz)" in shown
    assert (tmp_path / "summary-1.txt").read_text() in shown
    assert sorted(path.stem for path in (tmp_path / "logs-1").iterdir()) == [
        "beside",
        "one",
        "prepare",
        "three",
        "two",
    ]
    harmless.pop(1)
    assert gpu.main(["--out", str(tmp_path)]) == 0


def test_results_go_back_in_one_file(
    harmless: list[gpu.Stage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    back = tmp_path / "back"
    back.mkdir()
    monkeypatch.setenv("OUT", str(back))
    harmless.append((python("print('figures')", "one"),))
    assert gpu.main(["--second", "--out", str(tmp_path / "results")]) == 0
    assert [path.name for path in back.iterdir()] == ["gpu-2.tgz"]
    with tarfile.open(back / "gpu-2.tgz") as archive:
        assert {"results/logs-2/one.log", "results/summary-2.txt"} <= set(archive.getnames())


def test_a_kit_is_unpacked_and_its_kernels_are_counted(
    harmless: list[gpu.Stage],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A part that compiles one kernel more, in the cache that it is told."""
    (tmp_path / "made" / "HASH").mkdir(parents=True)
    (tmp_path / "made" / "HASH" / "_shrink.cubin").touch()
    kit.pack(tmp_path / "kit.tgz", tmp_path, tmp_path / "made")
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
    code = (
        "import os, pathlib; folder = pathlib.Path(os.environ['TRITON_CACHE_DIR'], 'NEW'); "
        "folder.mkdir(); (folder / '_expand.cubin').touch()"
    )
    harmless.append((python(code, "one"),))
    assert gpu.main(["--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "kit: no library, 1 kernels" in shown and "kernels compiled here: 1" in shown


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("call", [1, 2])
def test_shares_fit_into_the_calls(call: int, device: torch.device, tmp_path: Path) -> None:
    chosen = gpu.stages(call, device, tmp_path)
    names = [[part.name for part in stage] for stage in chosen]
    assert (
        names
        == {
            1: [
                ["libraries"],
                ["replays"],
                ["experiments"],
                ["tests", *gpu.SANITIZERS],
                ["benchmark"],
                ["ncu"],
                ["tune"],
            ],
            2: [["penalty"], ["e2e"]],
        }[call]
    )
    # The libraries are built only where those of the kit do not load.
    assert sum(max(part.seconds for part in stage) for stage in chosen) <= gpu.SECONDS[call] + 60
    assert gpu.SECONDS[1] < 600 and sum(gpu.SECONDS.values()) <= 750
    for part in (part for stage in chosen for part in stage):
        assert part.stub or device.type == "cuda" and part.name in (*gpu.SANITIZERS, "ncu"), part.name
        program = part.command[part.command.index("benchmarks") + 1] if "benchmarks" in part.command else ""
        assert program in PROGRAMS or program.startswith("--") or part.name == "tests"


def test_toys_where_there_is_no_device_and_real_shapes_where_there_is(tmp_path: Path) -> None:
    for call in (1, 2):
        toys, real = (
            {p.name: p.command for stage in gpu.stages(call, device, tmp_path) for p in stage}
            for device in (CPU, CUDA)
        )
        for name, command in real.items():
            assert "--toy" not in command and "toy" not in command, name
            # The tuner looks for a device itself.
            assert toys[name] != command or name == "tune", name
    assert "7b" in real["e2e"] and "toy" in toys["e2e"]


def test_toys_run_two_stages_at_a_time(tmp_path: Path) -> None:
    chosen = gpu.stages(1, CPU, tmp_path)
    joined = gpu.in_twos(chosen)
    assert [part for stage in joined for part in stage] == [part for stage in chosen for part in stage]
    assert len(joined) == (len(chosen) + 1) // 2


def test_compiling_ahead_is_left_out_with_a_kit(tmp_path: Path) -> None:
    tuned = {has: gpu.stages(1, CUDA, tmp_path, has)[-1][0].command for has in (False, True)}
    assert "--jobs" not in tuned[False] and tuned[True][-2:] == ("--jobs", "0")


def test_a_missing_library_is_in_the_summary(tmp_path: Path) -> None:
    """What `libraries` says last is why the CUDA library is not there."""
    (part,) = gpu.stages(1, CUDA, tmp_path)[0]
    reason = "libcram_cuda.so: nvcc failed: error: identifier is undefined"
    lines = gpu.summary([Ended(part, "failed (exit code 1)", 40.0, (reason,))], tmp_path, cuda=True)
    assert any("failed" in line for line in lines) and f"    {reason}" in lines


@pytest.mark.slow
def test_the_command_without_a_device(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Every part's own code runs, on toys."""
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    for options in ([], ["--second"]):
        assert gpu.main([*options, "--out", str(tmp_path)]) == 0
    shown = capfd.readouterr().out
    assert "out of time" not in shown and "failed" not in shown.split("== benchmark")[0]
    files = ("results", "experiments", "replays", "penalty", "e2e-toy", "tiles")
    assert all((tmp_path / f"{name}.json").is_file() for name in files)
    assert json.loads((tmp_path / "replays.json").read_text())["rows"][0]["wrong"] == 0


@pytest.mark.gpu
def test_a_graph_calls_every_set() -> None:
    totals = [torch.zeros(4, device=CUDA) for _ in range(3)]
    made = timing.sampler([lambda t=t: t.add_(1.0) for t in totals], CUDA, captured=True)
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
def test_a_tile_is_tried() -> None:
    case = Case("expand", "toy", "q", "toy", 64, 1, "bfloat16")
    tile = parts.shipped_tile(make(case, CUDA))
    (row,) = tune.measure(case, CUDA, [tile])
    assert row["median_us"] > 0 and row["error"] < 2e-2
