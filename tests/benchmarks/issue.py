"""Bounds by issued instructions of the launches that predictions speak of, from kernels compiled for sm_90.

python -m tests.benchmarks.issue           one line for each case: microseconds
python -m tests.benchmarks.issue --json    the same for a program
"""

from __future__ import annotations

import json
import sys
from unittest import mock

from benchmarks import ahead, ours, truth
from benchmarks.cases import PART_OPS, Case
from benchmarks.parts import triton_part
from benchmarks.predictions import PREDICTIONS
from benchmarks.problem import make
from cram_kernels.launch import Launch
from tests.cram_kernels import aot


def launches(case: Case) -> list[Launch]:
    """The launches of a case in order, of tensors without memory."""
    p, seen = make(case, ahead.META), list[Launch]()
    with ahead.compiling(), mock.patch.object(Launch, "run", lambda launch: seen.append(launch)):
        if case.op in PART_OPS:
            layer = triton_part(p)
        else:
            layer = (ours.one_stack if len(case.projections) > 1 else ours.two_ops)(p, "triton")
        truth.results(p, layer)
    return seen


def issue_us(case: Case) -> float:
    """The least microseconds in which an H200 issues the instructions of a case's launches."""
    found = [aot.compile_cases([aot.Case(case.name, (launch,))], ahead.HOPPER) for launch in launches(case)]
    return sum(record.issue_us for records in found for record in records)


def main() -> None:
    """Print the bound of every case that a prediction gives one for."""
    cases = {p.case.name: p.case for p in PREDICTIONS if p.case is not None and p.issue_us is not None}
    found = {name: issue_us(case) for name, case in cases.items()}
    if "--json" in sys.argv:
        print(json.dumps(found))
    else:
        print("\n".join(f"{name}: {us:.3g}" for name, us in found.items()))


if __name__ == "__main__":
    main()
