"""What a decode call does on the host: two launches, no compiler, nothing that a CUDA graph cannot
capture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest

from tests.cram_kernels.aot import ROOT

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton (Linux)")
# Base products (with their views of the weight) and memory from the caching allocator; no copy, fill or read.
CAPTURED = {"aten.mm", "aten.addmm", "aten.linear", "aten.t", "aten.empty", "aten.view", "aten._unsafe_view"}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """Calls in a process without the interpreter, on a driver that launches nothing."""
    settings = {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.cram_kernels.host", "--json"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("layers", ["1", "3"])
def test_decode_takes_two_launches(layers: str, found: dict[str, Any]) -> None:
    """A stack of three takes as many as one linear."""
    assert found[layers]["launches"] == {"_shrink": 1, "_expand": 1}


@pytest.mark.parametrize("layers", ["1", "3"])
def test_decode_can_be_captured(layers: str, found: dict[str, Any]) -> None:
    """No operation waits for the device, reads a tensor or copies one; memory is for U and each Y alone."""
    operations = found[layers]["operations"]
    assert operations.keys() <= CAPTURED, operations
    assert operations["aten.empty"] == 1


@pytest.mark.parametrize("call", ["1", "3", "training"])
def test_known_calls_do_not_ask_the_compiler(call: str, found: dict[str, Any]) -> None:
    assert found[call]["asked"] == 0


def test_launches_of_a_training_step(found: dict[str, Any]) -> None:
    """Forward 4 with dropout; backward 7, of which one gates Z for dBt."""
    assert sum(found["training"]["launches"].values()) == 11, found["training"]
