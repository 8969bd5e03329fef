"""The kit at toy size; and that everything which the GPU command launches would be compiled."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from benchmarks.machine import ROOT
from benchmarks.programs import prepare


def test_a_toy_kit(tmp_path: Path) -> None:
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    command = [sys.executable, "-m", "benchmarks", "prepare", "--toy", "--out", str(tmp_path / "kit.tgz")]
    command += ["--cache", str(tmp_path / "cache")]
    environment = os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 calls failed" in done.stdout
    with tarfile.open(tmp_path / "kit.tgz") as archive:
        names = [Path(name).name for name in archive.getnames()]
    assert "kit.json" in names and sum(name.endswith(".cubin") for name in names) >= 2
    # Newer releases of Triton have one launcher for all kernels.
    launchers = [name for name in names if "launcher" in name and name.endswith(".so")]
    assert bool(launchers) == hasattr(driver, "make_launcher")


def test_every_program_that_launches_kernels_is_prepared() -> None:
    """Names alone: each call is built on tensors without memory, and none is made."""
    starts = {name.split("/")[0].split()[0] for name, _ in prepare.all_calls(torch.device("meta"), toy=False)}
    assert starts >= {
        "replays",
        "experiments",
        "sanitize",
        "tune",
        "decode",
        "train",
        "stacked",
        "gates",
        "shrink",
    }
