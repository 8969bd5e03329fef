"""Everything that a CUDA machine can settle, in one command within ten minutes: `make gpu`.

Parts run one after another as processes of their own, each within its share of the time; what a part does
not use goes to the next. A part that fails or runs out of time costs the others nothing, and results are
written as they come. The last lines are the summary. Without a CUDA device all parts run on toy shapes, so
that they stay alive.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks import machine, report

TOTAL_SECONDS = 570.0
TAIL_LINES = 6
SHOWN = ("tests", "penalty", "tiles")  # whose last lines belong into the summary
# A case or shape that has begun may take so long.
LAST_CASE_SECONDS = 25.0
FAULT = 9  # exit code that compute-sanitizer is told to use


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        name: Shown in the summary.
        command: What runs; "{seconds}" stands for the time after which it should begin nothing more.
        seconds: Its share of the time.
        environment: Variables set for it.
        restarts: Whether it resumes where a crash stopped it, if it is started again.
        missing: Why it cannot run here, or None.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    restarts: bool = False
    missing: str | None = None


@dataclass(frozen=True)
class Ended:
    """How a part ended: ok, failed, out of time or skipped, and its last lines."""

    part: Part
    status: str
    seconds: float
    tail: tuple[str, ...] = ()


def parts(device: torch.device, out: Path) -> list[Part]:
    """Return the parts in their order."""
    cuda = device.type == "cuda"
    python, here = sys.executable, (sys.executable, "-m", "benchmarks")
    size = () if cuda else ("--toy",)
    tests = "-m", "pytest", "-m", "gpu", "-q", "--tb=short", "--continue-on-collection-errors"
    # Other versions of third-party packages warn of other things than those the suite knows.
    tests += ("-W", "default", "-p", "no:cacheprovider", *(() if cuda else ("--collect-only",)))
    # Most of the time goes into compiling kernels, which processes do side by side.
    tests += ("-n", "8") if cuda and find_spec("xdist") else ()
    no_pytest = None if find_spec("pytest") else "pytest is not installed"
    out_option, until = ("--out", str(out)), ("--seconds", "{seconds}")
    no_cuda = None if cuda else "no CUDA device"
    return [
        # The native libraries; where they cannot be built, their operations run otherwise and say so.
        Part("build", (python, "csrc/build.py"), 60, missing=no_cuda),
        Part("tests", (python, *tests), 140, missing=no_pytest),
        _sanitized("memcheck", cuda),
        _sanitized("racecheck", cuda),
        Part("benchmark", (*here, *size, *out_option, "--resume", *until), 170, restarts=True),
        Part("penalty", (*here, "penalty", "--device", device.type), 20, missing=no_cuda),
        Part("tiles", (*here, "tune", *out_option, *until), 80),
    ]


def _sanitized(tool: str, cuda: bool) -> Part:
    checks = (sys.executable, "-m", "benchmarks", "sanitize")
    if not cuda:
        return Part(tool, checks, 50, missing=None if tool == "memcheck" else "no CUDA device")
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    command = (found or "compute-sanitizer", "--tool", tool, "--error-exitcode", str(FAULT), *checks)
    # Allocations from the cache of PyTorch would hide accesses between two tensors.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Part(tool, command, 50, environment, missing=None if found else "compute-sanitizer is not there")


def run(part: Part, seconds: float, log: Path) -> Ended:
    """Run a part for at most so long; its output goes to the log."""
    if part.missing is not None:
        return Ended(part, f"skipped: {part.missing}", 0.0)
    begin = time.monotonic()
    code: int | None = None
    before = log.stat().st_size if log.is_file() else 0
    while True:
        left = seconds - (time.monotonic() - begin)
        started = time.monotonic()
        code = _process(part, left, log)
        # A crash within seconds of a start would only repeat itself.
        again = part.restarts and code not in (0, None) and time.monotonic() - started > 10
        if not again or seconds - (time.monotonic() - begin) < 20:
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


def summary(ended: Sequence[Ended], out: Path) -> list[str]:
    """Return the lines printed last: how the parts ended, then the benchmark's goals and headline figures."""
    lines = ["", "== parts"]
    for end in ended:
        lines.append(f"{end.part.name:12}{end.seconds:6.0f} s  {end.status}")
        if end.status != "ok" or end.part.name in SHOWN:
            lines += [f"    {text[:160]}" for text in end.tail]
    results = report.load(out / "results.json")
    if results is not None:
        lines += ["", "== benchmark", *report.compact(results)]
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Run all parts; returns 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the results (default: $OUT, or by machine)")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="time for all parts together")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = machine.results_folder()
    default = results if "OUT" in os.environ else results / machine.machine_name(device)
    out = (arguments.out or default).resolve()
    out.mkdir(parents=True, exist_ok=True)
    log = out / "gpu.log"
    log.unlink(missing_ok=True)
    for name, value in machine.environment(device).items():
        print(f"{name}: {value}", flush=True)
    if device.type != "cuda":
        print("no CUDA device: every part on toy shapes", flush=True)
    deadline, ended, spare = time.monotonic() + arguments.seconds, [], 0.0
    for part in parts(device, out):
        share = min(part.seconds + spare, deadline - time.monotonic())
        print(f"{part.name}: at most {share:.0f} s", flush=True)
        ended.append(run(part, share, log))
        spare = max(share - ended[-1].seconds, 0.0)
    lines = summary(ended, out)
    (out / "summary.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return int(any(end.status.startswith("failed") for end in ended))


if __name__ == "__main__":
    raise SystemExit(main())
