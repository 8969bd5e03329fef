"""Kernels compiled for tensors without memory are the very kernels that a launch on real tensors looks up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import ahead
from benchmarks.machine import ROOT

# Decode, and a training step with two segments; how often the driver was asked to load a kernel comes out.
CODE = """
import sys, torch
from benchmarks import ahead, truth
from benchmarks.cases import Case
from benchmarks.ours import two_ops
from benchmarks.problem import make
with ahead.compiling() as null:
    for op, tokens, segments in (("decode", 3, 3), ("train", 40, 2)):
        p = make(Case(op, "toy", "k", "toy", tokens, segments, "bfloat16"), torch.device(sys.argv[1]))
        truth.results(p, two_ops(p, "triton"))
print(*null.compiled)
"""


def compiled(device: str, cache: Path) -> list[str]:
    """Names of the kernels that a process of its own launches on tensors of a device."""
    settings = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CODE, device]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


def files(cache: Path) -> set[Path]:
    """Everything that a cache holds."""
    return {path.relative_to(cache) for path in cache.rglob("*") if path.is_file()}


def test_real_tensors_find_what_was_compiled_without(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    made = compiled("meta", tmp_path)
    before = files(tmp_path)
    assert len(made) == len(list(tmp_path.glob("*/*.cubin"))) > 4
    # A profiler finds the package's kernels by their names.
    assert all(name.startswith("_") for name in made)
    assert compiled("cpu", tmp_path) == made
    assert files(tmp_path) == before


def test_interpreted_kernels_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET must be 0 or unset"), ahead.compiling():
        pass
