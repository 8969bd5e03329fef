"""Everything that a CUDA machine can settle, in a call of 570 seconds and a short second one.

    python -m benchmarks gpu                the first: values before speed
    python -m benchmarks gpu --second       the second: the penalty, and whole models

Parts are processes of their own. A part that fails or runs out of time costs the others nothing, and what it
does not use of its time goes to the next. Results are written as they come; where $OUT is set, they are
packed into one archive there after every part. The last lines say how the parts ended and which predictions
held.

A kit that `python -m benchmarks prepare` made elsewhere is unpacked first (build/gpu-kit.tgz). Without a CUDA
device every part runs on toy shapes, and the summary names what is left out then.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import torch

from benchmarks import kit, machine, predictions, report
from benchmarks.processes import Ended, Part, run_beside

SECONDS = {1: 570.0, 2: 170.0}
FAULT = 9  # exit code that compute-sanitizer is told to use
TESTED = ("tests/cram_kernels", "tests/benchmarks/programs/test_gpu.py")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
HERE = (sys.executable, "-m", "benchmarks")
Stage = tuple[Part, ...]  # parts that run side by side


def stages(call: int, device: torch.device, out: Path, has_kit: bool = False) -> list[Stage]:
    """Return the parts of a call in their order.

    Args:
        call: 1 or 2.
        device: Where; on a CPU everything is a toy.
        out: Folder of the results.
        has_kit: Whether compiled kernels were brought along.
    """
    cuda = device.type == "cuda"
    toy, where, until = () if cuda else ("--toy",), ("--out", str(out)), ("--seconds", "{seconds}")
    interpreter = {} if cuda else {"TRITON_INTERPRET": "1"}
    eager = "calls are eager, under Triton's interpreter: no graph is captured"
    if call == 2:
        model = ("7b", "1", "16", "8") if cuda else ("toy", "0", "2", "2")
        sizes = zip(("--model", "--seconds", "--tokens", "--samples"), model, strict=True)
        variants = ("--variants", "bare", "released", "peft", "cram")
        whole = (*HERE, "e2e", *(text for pair in sizes for text in pair), *variants, *where)
        penalty = (*HERE, "penalty", *toy, "--device", device.type, *where)
        return [
            (Part("penalty", penalty, 40, stub="the CPU's candidates on three small modules", shown=True),),
            (Part("e2e", whole, 120, stub="a random LLaVA of two small layers", shown=True),),
        ]
    return [
        (_libraries(cuda),),
        (_asks("replays", 45, (*toy, *where, *until), interpreter, eager),),
        (_asks("experiments", 90, (*toy, *where, *until), interpreter, eager),),
        (_tests(cuda), *(_sanitized(tool, cuda) for tool in SANITIZERS)),
        (
            Part(
                "benchmark",
                (*HERE, *toy, *where, "--resume", *until),
                125,
                {"TORCH_COMPILE_DISABLE": "1"},
                restarts=True,
                stub="no candidate of Triton",
            ),
        ),
        (_profiled(cuda, toy, interpreter),),
        (_asks("tune", 75, (*where, *until, *(("--jobs", "0") if has_kit else ())), interpreter, eager),),
    ]


def in_twos(chosen: Sequence[Stage]) -> list[Stage]:
    """Return every two stages as one. The times of toys mean nothing, so toys may run side by side."""
    return [tuple(chain(*chosen[i : i + 2])) for i in range(0, len(chosen), 2)]


def _asks(
    name: str, seconds: float, options: tuple[str, ...], environment: dict[str, str], stub: str
) -> Part:
    options = (*options, "--replays", "3") if name == "replays" and environment else options
    command = (*HERE, name, *options)
    return Part(name, command, seconds, environment, missing=_no("triton"), stub=stub, shown=True)


def _no(package: str) -> str | None:
    return None if find_spec(package) else f"{package} is not installed"


def _libraries(cuda: bool) -> Part:
    command = (*HERE, "libraries", *(() if cuda else ("--check",)))
    return Part("libraries", command, 60, stub="what is amiss is said and not built", shown=True)


def _tests(cuda: bool) -> Part:
    command = (sys.executable, "-m", "pytest", *TESTED, "-m", "gpu", "-q", "--tb=short")
    # Other versions of third-party packages warn of other things than those the suite knows.
    command += ("--continue-on-collection-errors", "-W", "default", "-p", "no:cacheprovider")
    # Most of the time goes into compiling kernels, which processes do side by side.
    command += () if not cuda else ("-n", "8") if find_spec("xdist") else ()
    command += () if cuda else ("--collect-only",)
    stub = "tests that need a CUDA device are collected, not run"
    return Part("tests", command, 150, missing=_no("pytest"), stub=stub, shown=True)


def _tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def _sanitized(tool: str, cuda: bool) -> Part:
    checks = (*HERE, "sanitize")
    if not cuda:
        missing = None if tool == SANITIZERS[0] else "no CUDA device; its command is the first sanitizer's"
        return Part(tool, checks, 150, missing=missing, stub="the checks run without compute-sanitizer")
    found = _tool("compute-sanitizer")
    command = (found or "compute-sanitizer", "--tool", tool, "--error-exitcode", str(FAULT), *checks)
    # PyTorch's caching allocator would hide wrong accesses between two tensors.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Part(tool, command, 150, environment, missing=None if found else "compute-sanitizer is not there")


def _profiled(cuda: bool, toy: tuple[str, ...], environment: dict[str, str]) -> Part:
    program = (*HERE, "profile", *toy)
    if not cuda:
        stub = "the kernels run without ncu, in the interpreter"
        return Part("ncu", program, 45, environment, missing=_no("triton"), stub=stub)
    found = _tool("ncu")
    # The card's clocks are left as they are. The package's kernels begin with an underscore.
    options = ("--clock-control", "none", "--set", "basic", "-k", "regex:^_")
    missing = None if found else "ncu is not there"
    return Part("ncu", (found or "ncu", *options, *program), 45, missing=missing)


def summary(ended: Sequence[Ended], out: Path, cuda: bool) -> list[str]:
    """Return the lines printed last: how the parts ended, the benchmark's goals, and what held."""
    lines = ["", "== parts"]
    for end in ended:
        lines.append(f"{end.part.name:12}{end.seconds:6.0f} s  {end.status}")
        if end.part.missing is None and end.part.stub and not cuda:
            lines.append(f"    left out: {end.part.stub}")
        if end.part.missing is None and (end.status != "ok" or end.part.shown):
            lines += [f"    {text[:160]}" for text in end.tail]
    measured = any(end.part.name == "benchmark" for end in ended)
    results = report.load(out / "results.json") if measured else None
    if results is not None:
        lines += ["", "== benchmark", *report.compact(results)]
    return [*lines, "", "== predictions", *predictions.verdicts(predictions.load(out))]


def brought(file: Path, cache: Path) -> list[str]:
    """Unpack a kit; return lines for a reader."""
    if not file.is_file():
        return [f"no kit ({file.name}): libraries and kernels are made here"]
    return kit.unpack(file, cache=cache)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts of one call; returns 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--second", action="store_true", help="the short second call")
    parser.add_argument("--out", type=Path, help="folder of the results (default: build/gpu with $OUT set)")
    parser.add_argument("--seconds", type=float, help="time for all parts together (default: 570, 170)")
    arguments = parser.parse_args(argv)
    begin, call = time.monotonic(), 2 if arguments.second else 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results, back = machine.results_folder(), os.environ.get("OUT")
    default = machine.ROOT / "build" / "gpu" if back else results / machine.machine_name(device)
    out = (arguments.out or default).resolve()
    logs = out / f"logs-{call}"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    for name, value in machine.environment(device).items():
        print(f"{name}: {value}", flush=True)
    cuda = device.type == "cuda"
    cache, file = (kit.CACHE, kit.KIT) if cuda else (out / "kernels", out / "kit.tgz")
    deadline = begin + (arguments.seconds or SECONDS[call])
    ended: list[Ended] = []
    if not cuda:
        print("no CUDA device: every part on toy shapes", flush=True)
        ended += run_beside((_prepared(file, out),), deadline - time.monotonic(), logs) if call == 1 else []
    said = brought(file, cache)
    print("\n".join(said), flush=True)
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    before, spare = kit.count_kernels(cache), 0.0
    chosen = stages(call, device, out, file.is_file())
    for stage in chosen if cuda else in_twos(chosen):
        share = min(max(part.seconds for part in stage) + spare, deadline - time.monotonic())
        print(f"{', '.join(part.name for part in stage)}: at most {share:.0f} s", flush=True)
        started = time.monotonic()
        ended += run_beside(stage, share, logs)
        spare = max(share - (time.monotonic() - started), 0.0)
        if back:
            kit.pack_results(out, Path(back) / f"gpu-{call}.tgz")
    said.append(f"kernels compiled here: {kit.count_kernels(cache) - before}")
    lines = [*said, *summary(ended, out, cuda)]
    (out / f"summary-{call}.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    if back:
        kit.pack_results(out, Path(back) / f"gpu-{call}.tgz")
    return int(any(end.status.startswith("failed") for end in ended))


def _prepared(file: Path, out: Path) -> Part:
    command = (*HERE, "prepare", "--toy", "--out", str(file), "--cache", str(out / "kernels"))
    stub = "two kernels are compiled, and the libraries are those that are there"
    return Part("prepare", command, 60, {"TRITON_INTERPRET": "0"}, missing=_no("triton"), stub=stub)


if __name__ == "__main__":
    raise SystemExit(main())
