"""A few cases through pytest-benchmark, to compare two commits with a standard tool.

    pytest benchmarks --benchmark-only --benchmark-autosave
    pytest-benchmark compare

This module is not part of the test suite and asserts no time.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import machine
from benchmarks.candidates import taking_part
from benchmarks.cases import Case, grid
from benchmarks.problem import make, rotation, smaller
from benchmarks.suite import GATE_TOKENS, passed, step
from benchmarks.timing import sampler

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [
    *grid(("decode",), ("Qwen3-VL-2B.q",), (1, 64)),
    *grid(("train",), ("Qwen3-VL-2B.q",), (8, 1024)),
    *grid(("gates",), ("LLaVA-1.5-7B",), (8,), ("float32",)),
]


def _chosen() -> list[Any]:
    """The package's candidates of each case, and the base linear for comparison."""
    return [
        pytest.param(case, name, id=f"{case.name}-{name}")
        for case in CASES
        for name, candidate in taking_part(case.op).items()
        if (candidate.ours or name == "base") and candidate.missing(case, DEVICE) is None
    ]


@pytest.mark.parametrize(("case", "name"), _chosen())
def test_speed(benchmark: Any, case: Case, name: str) -> None:
    candidate = taking_part(case.op)[name]
    passed(candidate, make(smaller(case, GATE_TOKENS[DEVICE.type]), DEVICE, seed=1))
    problems = rotation(case, DEVICE, machine.cache_bytes(DEVICE))
    with torch.set_grad_enabled(case.training):
        steps = [step(p, candidate.build(p)) for p in problems]
        ready = sampler(steps, DEVICE, candidate.captured)

        def sample() -> None:
            ready.run()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        benchmark.extra_info |= {"calls": ready.calls, "mode": ready.mode}
        benchmark(sample)
