"""Makes the kit that the GPU command brings to a machine: native libraries and compiled kernels in one file.

Run it with an interpreter that has the machine's Python, torch and Triton, beside an nvcc of torch's CUDA; it
needs no GPU. Every kernel that the programs of the GPU command launch is compiled for sm_90, so that the
machine's minutes go into measuring.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks import ahead, kit, truth
from benchmarks.candidates import taking_part
from benchmarks.cases import SUITES
from benchmarks.problem import make
from benchmarks.programs import experiments, profile, replays, sanitize, tune
from benchmarks.suite import failures
from csrc import build

Call = tuple[str, Callable[[], Any]]


def suite_calls(suite: str, device: torch.device) -> Iterator[Call]:
    """Yield the cases of the main benchmark that launch kernels of this package."""
    for case in SUITES[suite, "cuda"]:
        for name, candidate in taking_part(case.op).items():
            if candidate.ours and "triton" in name:
                p = make(case, device)
                yield f"{case.name} {name}", partial(truth.results, p, candidate.build(p))


def all_calls(device: torch.device, toy: bool) -> Iterator[Call]:
    """Yield what the programs of the GPU command launch, the most important first."""
    if toy:
        yield from list(suite_calls("toy", device))[:1]
        return
    yield from replays.calls(device)
    yield from profile.calls(device)
    yield from experiments.calls(device)
    yield from sanitize.calls(device)
    yield from suite_calls("full", device)
    yield from suite_calls("toy", device)
    yield from tune.calls(device)


def compile_kernels(cache: Path, toy: bool, seconds: float) -> tuple[Counter[str], list[str]]:
    """Fill an empty cache; return how many kernels of each name it got, and which calls failed.

    A tile of the tuner may ask for more than the machine has; such a call does not count as failed.
    """
    os.environ |= {"TRITON_CACHE_DIR": str(cache), "TRITON_STORE_BINARY_ONLY": "1"}
    deadline, failed = time.monotonic() + seconds, []
    with TemporaryDirectory() as stub:
        ahead.stub_cuda(Path(stub))
        os.environ["TRITON_LIBCUDA_PATH"] = stub
        with ahead.compiling(launchers=True) as null:
            for count, (name, call) in enumerate(all_calls(ahead.META, toy)):
                if time.monotonic() > deadline:
                    print(f"out of time before {name}", flush=True)
                    break
                try:
                    call()
                except failures() as error:
                    failed += [] if name.startswith("tune ") else [name]
                    print(f"{name} FAILED: {type(error).__name__}: {str(error)[:200]}", flush=True)
                if count % 20 == 0:
                    print(f"{len(null.compiled)} kernels: {name}", flush=True)
    print(f"{len(failed)} calls failed")
    return Counter(null.compiled), failed


def main(argv: Sequence[str] | None = None) -> int:
    """Build, compile and pack; returns 1 if a kernel, or a library that torch could use, is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks prepare", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=kit.KIT, metavar="FILE", help=f"(default: {kit.KIT.name})"
    )
    parser.add_argument("--cache", type=Path, default=kit.CACHE, metavar="DIR", help="emptied, then filled")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="compile no kernel after so long")
    parser.add_argument("--toy", action="store_true", help="two kernels and the libraries that are there")
    arguments = parser.parse_args(argv)
    with TemporaryDirectory() as scratch:
        if arguments.toy:
            libraries, missing = kit.LIBRARIES, {}
        else:
            libraries = Path(scratch)
            missing = build.build(libraries)
        shutil.rmtree(arguments.cache, ignore_errors=True)
        found, failed = compile_kernels(arguments.cache, arguments.toy, arguments.seconds)
        kit.pack(arguments.out, libraries, arguments.cache)
    print(f"kernels: {dict(sorted(found.items()))}")
    print(f"{arguments.out}: {arguments.out.stat().st_size / 2**20:.1f} MiB")
    lost = missing.keys() & build.wanted(build.torch_folder())
    for name in sorted(lost):
        print(f"missing: {build.LIBRARIES[name]}: {missing[name]}")
    return int(bool(lost or failed))


if __name__ == "__main__":
    raise SystemExit(main())
