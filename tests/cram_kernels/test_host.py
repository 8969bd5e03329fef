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
ALLOCATIONS = {"aten.empty", "aten.new_empty"}
CAPTURED = {"aten.mm", "aten.addmm", "aten.linear", "aten.t", "aten.view", "aten._unsafe_view", *ALLOCATIONS}


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


def launches(found: dict[str, Any]) -> list[str]:
    """Names of the kernels in the order of their launches."""
    return [name for name in found["seen"] if name.startswith("_")]


@pytest.mark.parametrize(
    ("call", "pair"),
    [
        ("linear", ["_shrink", "_expand"]),
        ("stack", ["_shrink", "_expand"]),
        ("routed", ["_routed_shrink", "_expand"]),
        ("streamed", ["_stream", "_join"]),
    ],
)
def test_decode_takes_two_launches(call: str, pair: list[str], found: dict[str, Any]) -> None:
    """A stack of three takes as many as one linear, and so does a linear that routes."""
    assert launches(found[call]) == pair


# What a call allocates beside its base products: U in planes; gates; each Y and its planes.
@pytest.mark.parametrize(("call", "allocated"), [("linear", 1), ("stack", 1), ("routed", 2), ("streamed", 5)])
def test_decode_can_be_captured(call: str, allocated: int, found: dict[str, Any]) -> None:
    """No operation waits for the device, reads a tensor, fills one or copies one."""
    operations = [name for name in found[call]["seen"] if not name.startswith("_")]
    assert set(operations) <= CAPTURED, operations
    assert sum(name in ALLOCATIONS for name in operations) == allocated, operations
    assert call != "streamed" or not set(operations) - ALLOCATIONS


@pytest.mark.parametrize("call", ["linear", "stack", "routed"])
def test_nothing_stands_between_a_launch_and_the_one_that_starts_early(
    call: str, found: dict[str, Any]
) -> None:
    """The second would read, before its wait, what an operation between the two has not written yet."""
    seen = found[f"{call} strided"]["seen"]
    first, second = launches(found[f"{call} strided"])
    assert "aten.clone" in seen, seen  # B is copied
    between = seen[seen.index(first) + 1 : seen.index(second)]
    assert set(between) <= ALLOCATIONS, seen


@pytest.mark.parametrize("call", ["linear", "stack", "routed", "streamed", "training"])
def test_known_calls_do_not_ask_the_compiler(call: str, found: dict[str, Any]) -> None:
    assert found[call]["asked"] == 0


@pytest.mark.parametrize("call", ["linear", "stack", "routed", "streamed"])
def test_known_calls_are_not_described_again(call: str, found: dict[str, Any]) -> None:
    """Unless a launch reads a copy that each call makes."""
    assert found[call]["described"] == 0
    assert found.get(f"{call} strided", {"described": 2})["described"] == 2


def test_a_kind_first_seen_with_one_pack_thrice_reads_three(found: dict[str, Any]) -> None:
    assert found["repeated"]["packs"] == 3


def test_launches_of_a_training_step(found: dict[str, Any]) -> None:
    """Forward 4 with dropout; backward 7, of which one gates Z for dBt. The mask is hashed once."""
    names = launches(found["training"])
    assert len(names) == 11 and names.count("_dropout_bits") == 1, names
