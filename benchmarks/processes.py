"""Programs run as processes of their own, some side by side, each within its time and with its own log."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import machine

TAIL_LINES = 6
# A case or shape that has begun may take so long.
LAST_CASE_SECONDS = 25.0
# A crash within so many seconds of a start would only repeat itself.
QUICK_CRASH_SECONDS = 10.0
LEAST_RESTART_SECONDS = 20.0


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        name: Shown in the summary; the log is <name>.log.
        command: What runs; "{seconds}" stands for the time after which it should begin nothing more.
        seconds: Its share of the time.
        environment: Variables set for it.
        restarts: Whether it resumes where a crash stopped it, if it is started again.
        missing: Why it cannot run here, or None.
        stub: What it leaves out or replaces without a CUDA device, or "".
        shown: Whether its last lines belong into the summary also where it ended well.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    restarts: bool = False
    missing: str | None = None
    stub: str = ""
    shown: bool = False


@dataclass(frozen=True)
class Ended:
    """How a part ended: ok, failed, out of time or skipped, and its last lines."""

    part: Part
    status: str
    seconds: float
    tail: tuple[str, ...] = ()


def run_beside(parts: Sequence[Part], seconds: float, logs: Path) -> list[Ended]:
    """Run parts side by side, all of them for at most so long; return how each ended, in their order."""
    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(lambda part: run(part, seconds, logs), parts))


def run(part: Part, seconds: float, logs: Path) -> Ended:
    """Run a part for at most so long; its output goes to its log."""
    if part.missing is not None:
        return Ended(part, f"skipped: {part.missing}", 0.0)
    begin, log = time.monotonic(), logs / f"{part.name}.log"
    before = log.stat().st_size if log.is_file() else 0
    while True:
        left = seconds - (time.monotonic() - begin)
        started = time.monotonic()
        code = _process(part, left, log)
        crashed = code not in (0, None) and time.monotonic() - started > QUICK_CRASH_SECONDS
        left = seconds - (time.monotonic() - begin)
        if not (part.restarts and crashed and left >= LEAST_RESTART_SECONDS):
            break
    status = "ok" if code == 0 else "out of time" if code is None else f"failed (exit code {code})"
    with log.open(errors="replace") as file:
        file.seek(before)
        lines = [line.rstrip() for line in file if line.strip()]
    return Ended(part, status, time.monotonic() - begin, tuple(lines[-TAIL_LINES:]))


def _process(part: Part, seconds: float, log: Path) -> int | None:
    """Return the exit code, or None if the time was over; the process and its children are ended then."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **part.environment}
    with log.open("a") as file:
        until = f"{max(seconds - LAST_CASE_SECONDS, 1.0):.0f}"
        command = [text.replace("{seconds}", until) for text in part.command]
        print(f"$ {' '.join(command)}", file=file, flush=True)
        process = subprocess.Popen(
            command,
            cwd=machine.ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(max(seconds, 1.0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None
