"""Each kernel of the layer a few times at one size, for a profiler that counts:

    ncu --clock-control none -k regex:^_ python -m benchmarks profile

The package's kernels are those whose names begin with an underscore.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks.cases import PART_OPS, grid
from benchmarks.parts import triton_part
from benchmarks.problem import make

SHAPES = [*grid(PART_OPS, ("LLaVA-1.5-7B.q",), (8192,)), *grid(PART_OPS[:2], ("LLaVA-1.5-7B.q",), (16,))]
TOY = grid(PART_OPS, ("toy.q",), (32,), ("float32",), ("toy",))


def calls(device: torch.device, toy: bool = False) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield each product and size, each with a call that launches its kernels."""
    for case in TOY if toy else SHAPES:
        yield case.name, torch.no_grad()(triton_part(make(case, device)).forward)


def main(argv: Sequence[str] | None = None) -> int:
    """Run every call `--times` times."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks profile", description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=2, help="calls of each (default: 2)")
    parser.add_argument("--toy", action="store_true", help="tiny shapes: whether it runs")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, call in calls(device, arguments.toy):
        for _ in range(arguments.times):
            call()
        print(name, flush=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
