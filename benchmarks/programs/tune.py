"""Try tiles of SHRINK, EXPAND and GRAM on this GPU, and compare them with the shipped tiles.

Candidates are compiled in parallel processes into Triton's cache on disk (with `--jobs 0` that cache is there
already), then checked and timed one after another in this one. Nothing is changed: tiles.json says what won,
and a person edits `cram_kernels/expert_lora/tiles.py`. Without a CUDA device two tiles are tried on toy
shapes, under Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, truth
from benchmarks.cases import Case, grid
from benchmarks.parts import shipped_tile, triton_part
from benchmarks.problem import make, rotation
from benchmarks.report import duration
from benchmarks.suite import failures
from benchmarks.timing import Limits, interleaved, sampler

_7B = "LLaVA-1.5-7B.q"
# In the order of importance: time may run out.
SHAPES = [
    *grid(("shrink", "expand", "gram"), (_7B,), (8192, 1024)),
    *grid(("shrink", "expand"), (_7B,), (16, 64, 256)),
    *grid(("shrink", "expand"), (_7B,), (8192, 16), streams=("64x8",)),
    *grid(("shrink", "expand"), ("Qwen3-VL-2B.q",), (8192, 16)),
]
TOY = grid(("shrink", "expand", "gram"), ("toy.q",), (32,), ("float32",), ("toy",))
LIMITS = Limits(0.0, 5, 5)
JOBS = max(1, min(12, (os.cpu_count() or 2) - 2))
# Field -> values to try, up to 64 tokens and beyond; fields in the order of the tile's.
SHRINK_SMALL = {
    "block_t": (16,),
    "block_r": (16, 32, 128),
    "block_k": (128, 256),
    "split_k": (4, 8, 16),
    "warps": (2, 4),
    "stages": (3, 4),
}
SHRINK_LARGE = {
    "block_t": (64, 128),
    "block_r": (64, 128),
    "block_k": (32, 64),
    "split_k": (1, 2, 4),
    "warps": (4, 8),
    "stages": (3, 4),
}
EXPAND_SMALL = {
    "block_t": (16, 32),
    "block_r": (64, 128),
    "block_d": (32, 64, 128),
    "warps": (4, 8),
    "stages": (1,),
}
EXPAND_LARGE = {
    "block_t": (64, 128),
    "block_r": (64, 128),
    "block_d": (64, 128, 256),
    "warps": (4, 8),
    "stages": (1, 2),
}
GRAM = {
    "block_t": (64, 128),
    "block_r": (16, 64),
    "block_d": (64, 128),
    "split_t": (4, 8, 16),
    "warps": (4, 8),
    "stages": (1, 2),
}
SPACES = {
    "shrink": (SHRINK_SMALL, SHRINK_LARGE),
    "expand": (EXPAND_SMALL, EXPAND_LARGE),
    "gram": (GRAM, GRAM),
}
SMALL_TOKENS = 64


def candidates(case: Case, shipped: Any) -> list[Any]:
    """Return the tiles to try. The shipped tile comes first."""
    space = SPACES[case.op][case.tokens > SMALL_TOKENS]
    tiles = [type(shipped)(**dict(zip(space, values, strict=True))) for values in product(*space.values())]
    most_t = max(16, case.tokens)
    return [shipped, *(tile for tile in tiles if tile != shipped and tile.block_t <= most_t)]


def calls(device: torch.device) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield every shape and tile, each with a call that launches its kernels."""
    for case in SHAPES:
        p = make(case, device)
        for tile in candidates(case, shipped_tile(p)):
            yield f"tune {case.name} {tile}", torch.no_grad()(triton_part(p, tile).forward)


def compile_all(case: Case, tiles: Sequence[Any]) -> None:
    """Run each tile once, which leaves its code in the disk cache. Failures appear again in the timing."""
    problem = make(case, torch.device("cuda"))
    for tile in tiles:
        try:
            triton_part(problem, tile).forward()
            torch.cuda.synchronize()
        except failures():
            continue


def warm(pool: ProcessPoolExecutor, case: Case, tiles: Sequence[Any], jobs: int) -> None:
    """Compile in parallel."""
    chunks = [list(tiles[i::jobs]) for i in range(jobs)]
    for done in [pool.submit(compile_all, case, chunk) for chunk in chunks if chunk]:
        done.result()


def measure(case: Case, device: torch.device, tiles: Sequence[Any]) -> list[dict[str, Any]]:
    """Return per tile the median time or the reason for its absence. A tile is timed after it was checked."""
    problems = rotation(case, device, machine.cache_bytes(device))
    expected = truth.parts(problems[0])
    found = []
    with torch.no_grad():
        for tile in tiles:
            row: dict[str, Any] = {"tile": asdict(tile)}
            try:
                layers = [triton_part(problem, tile) for problem in problems]
                row["error"] = truth.error({"y": layers[0].forward()}, expected, truth.LIMITS[case.dtype])
                timed = sampler([layer.forward for layer in layers], device, captured=True)
                row |= asdict(interleaved({"tile": timed}, device, LIMITS)["tile"])
            except failures() as error:
                row["failed"] = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            found.append(row)
    return found


def tune(
    device: torch.device, shapes: Sequence[Case], seconds: float, jobs: int, most: int | None = None
) -> Iterator[dict[str, Any]]:
    """Yield one result for each shape until the time is over; with `jobs` 0, nothing is compiled ahead."""
    deadline = time.monotonic() + seconds
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) if jobs else None
    with pool or nullcontext():
        for case in shapes:
            if time.monotonic() > deadline:
                return
            tiles = candidates(case, shipped_tile(make(case, device)))[:most]
            try:
                if pool is not None:
                    warm(pool, case, tiles, jobs)
            except BrokenExecutor as error:
                yield {"name": case.name, "failed": str(error)}
                return
            yield summary(case, measure(case, device, tiles))


def summary(case: Case, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the shipped tile, the fastest tile, and all tried tiles, fastest first."""
    timed = sorted((row for row in rows if "median_us" in row), key=lambda row: row["median_us"])
    return {
        "name": case.name,
        "shipped": rows[0],
        "best": timed[0] if timed else None,
        "tried": len(rows),
        "rows": timed[:10] + [row for row in rows if "failed" in row][:3],
    }


def line(found: dict[str, Any]) -> str:
    """One shape on one line."""
    if "failed" in found or found["best"] is None:
        return f"{found['name']}: {found.get('failed', 'no tile ran')}"
    best, shipped = found["best"], found["shipped"]
    before = duration(shipped["median_us"]) if "median_us" in shipped else f"failed ({shipped['failed']})"
    values = tuple(best["tile"].values())
    return (
        f"{found['name']}: shipped {before}, best {duration(best['median_us'])} {values} of {found['tried']}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Tune and write tiles.json after every shape."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks tune", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of tiles.json")
    parser.add_argument("--seconds", type=float, default=600.0, help="begin no shape after so long")
    parser.add_argument("--jobs", type=int, default=JOBS, help="processes that compile; 0 for none")
    arguments = parser.parse_args(argv)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    found: dict[str, Any] = {"environment": machine.environment(device), "shapes": []}
    arguments.out.mkdir(parents=True, exist_ok=True)
    chosen = (SHAPES, arguments.seconds, arguments.jobs) if cuda else (TOY, arguments.seconds, 0, 2)
    if not cuda:
        print("tune: no CUDA device, two tiles on toy shapes")
    for shape in tune(device, *chosen):
        found["shapes"].append(shape)
        (arguments.out / "tiles.json").write_text(json.dumps(found, indent=1) + "\n")
        print(line(shape), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
