"""`cram bench` starts the benchmarks of a source checkout, and only of one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.__main__ import PROGRAMS, main
from cram import cli
from cram.commands import bench

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("code", [0, 3])
def test_bench_runs_the_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int) -> None:
    calls: list[tuple[list[str], Any]] = []

    def run(command: list[str], cwd: Path, check: bool) -> SimpleNamespace:
        calls.append((command, cwd))
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.chdir(tmp_path)
    arguments = ["bench", "--quick", "--device", "cpu", "--out", "here"]
    if code:
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert stopped.value.code == code
    else:
        assert cli.main(arguments) == 0
    options = ["--quick", "--device", "cpu", "--out", str(tmp_path / "here")]
    assert calls == [([sys.executable, "-m", "benchmarks", *options], ROOT)]


def test_bench_needs_a_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "cram" / "commands" / "bench.py"))
    assert cli.main(["bench"]) == 2
    assert "cram bench must run from a source checkout with its benchmarks, got" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], *([name] for name in PROGRAMS)])
def test_every_program_has_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--help"])
    assert stopped.value.code == 0
    assert re.match(rf"usage: python -m benchmarks {''.join(arguments)}", capsys.readouterr().out)
