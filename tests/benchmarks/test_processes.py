"""Parts end as they end, alone and side by side, with harmless programs."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from benchmarks import processes
from benchmarks.processes import Part


def python(code: str, name: str = "part", **options: object) -> Part:
    """A part that runs some Python."""
    return Part(name, (sys.executable, "-c", code), 5.0, **options)  # type: ignore[arg-type]


def test_parts_end_as_they_end(tmp_path: Path) -> None:
    good = processes.run(python("print('figures')"), 5.0, tmp_path)
    bad = processes.run(python("import sys; print('why'); sys.exit(3)"), 5.0, tmp_path)
    slow = processes.run(python("import time; print('begun', flush=True); time.sleep(60)"), 1.5, tmp_path)
    absent = processes.run(python("", missing="no such tool"), 5.0, tmp_path)
    assert [end.status for end in (good, bad, slow, absent)] == [
        "ok",
        "failed (exit code 3)",
        "out of time",
        "skipped: no such tool",
    ]
    assert good.tail[-1] == "figures" and bad.tail[-1] == "why" and slow.tail[-1] == "begun"
    assert slow.seconds < 10


def test_parts_side_by_side_have_logs_of_their_own(tmp_path: Path) -> None:
    """The two wait for each other: one after another, the first would run out of time."""
    code = (
        "import pathlib, sys, time\n"
        "here = pathlib.Path(sys.argv[1])\n"
        "(here / sys.argv[2]).touch()\n"
        "while len(list(here.iterdir())) < 2: time.sleep(0.01)\n"
        "print(sys.argv[2])"
    )
    met = tmp_path / "met"
    met.mkdir()
    parts = [Part(n, (sys.executable, "-c", code, str(met), n), 5.0) for n in ("one", "two")]
    started = time.monotonic()
    ended = processes.run_beside(parts, 20.0, tmp_path)
    assert [(end.part.name, end.status, end.tail[-1]) for end in ended] == [
        ("one", "ok", "one"),
        ("two", "ok", "two"),
    ]
    assert time.monotonic() - started < 20
    assert (tmp_path / "one.log").is_file() and (tmp_path / "two.log").is_file()


def test_parts_know_when_to_stop(tmp_path: Path) -> None:
    part = Part("part", (sys.executable, "-c", "import sys; print(sys.argv[1])", "{seconds}"), 5.0)
    assert processes.run(part, 65.0, tmp_path).tail[-1] == f"{65 - processes.LAST_CASE_SECONDS:.0f}"


def test_parts_see_their_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", "folder")
    part = python("import os; print(os.environ['SOME'], os.environ['OUT'])", environment={"SOME": "value"})
    assert processes.run(part, 5.0, tmp_path).tail[-1] == "value folder"


def test_only_a_late_crash_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os, pathlib; p = pathlib.Path('{0}'); p.write_text(p.read_text() + '.'); os.abort()"
    count = tmp_path / "count"
    part = python(code.format(count), restarts=True)
    count.write_text("")
    assert processes.run(part, 30.0, tmp_path).status.startswith("failed")
    assert count.read_text() == "."
    monkeypatch.setattr(processes, "QUICK_CRASH_SECONDS", 0.0)
    monkeypatch.setattr(processes, "LEAST_RESTART_SECONDS", 28.0)
    count.write_text("")
    processes.run(part, 30.0, tmp_path)
    assert len(count.read_text()) > 1
