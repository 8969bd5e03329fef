"""Loading a bundle: its time against the number of experts, and the memory that it needs beside the base.

    python -m benchmarks loading                     100 and 200 experts
    python -m benchmarks loading --experts 50 100

The base is a random LLaVA with 24 adapted linears of width 1024, an expert has rank 8 in each of them. The
time is the least of a few loads, files in the page cache. The memory is the largest resident size during a
load over the one before it, in bytes of the experts; Linux alone tells it.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.cases import QUERY_WIDTH
from benchmarks.models import Size, random_llava
from cram import CramConfig, attach, detach, load, save

RANK, TEXT_WIDTH = 8, 512
SIZE = Size(1024, 6, 16, 64, (32, 2, 28), 512)
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def encoder() -> Any:
    """Stands for the CLIP, of which a load needs the widths alone."""
    return SimpleNamespace(
        source="", sha256="", text_dim=TEXT_WIDTH, image_dim=QUERY_WIDTH, reuses_vision_tower=False
    )


def write_bundle(model: Any, folder: Path, experts: int) -> int:
    """Save random experts of rank 8, all in one group; returns the bytes of their factors."""
    torch.manual_seed(0)
    cram = attach(model, CramConfig(), encoder())
    names = [f"task{index}" for index in range(experts)]
    weights = [
        {
            path: (torch.randn(RANK, linear.in_features), torch.randn(linear.out_features, RANK))
            for path, linear in cram.modules.items()
        }
        for _ in names
    ]
    cram.set_experts(names, weights, 0)
    for name in names:
        cram.method.router.add_expert(name, 0, torch.randn(QUERY_WIDTH), trained=False)
    save(model, folder)
    packs = [module.experts for module in cram.modules.values()]
    detach(model)
    return sum(4 * (pack.a.numel() + pack.bt.numel()) for pack in packs if pack is not None)


def time_load_s(model: Any, folder: Path) -> float:
    """Seconds of one load."""
    start = time.perf_counter()
    load(model, folder, encoder())
    seconds = time.perf_counter() - start
    detach(model)
    return seconds


def peak_bytes(model: Any, folder: Path) -> int | None:
    """Largest resident size during a load over the one before it; None where the system does not tell."""
    gc.collect()
    try:
        CLEAR.write_text("5")
    except OSError:
        return None
    before = _resident("VmRSS")
    load(model, folder, encoder())
    peak = _resident("VmHWM") - before
    detach(model)
    return peak


def _resident(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def base() -> Any:
    """The random LLaVA."""
    return random_llava(SIZE, torch.device("cpu"), torch.float32, 1).model


def measure_loads(small: Path, folder: Path, repeats: int) -> tuple[int | None, float]:
    """Peak bytes of the first load of a bundle and the least seconds of some more.

    Args:
        small: Another bundle, which is loaded first: whatever is imported once is imported then.
        folder: The bundle.
        repeats: Timed loads.
    """
    model = base()
    time_load_s(model, small)
    peak = peak_bytes(model, folder)
    return peak, min(time_load_s(model, folder) for _ in range(repeats))


def measure(experts: int, repeats: int) -> dict[str, Any]:
    """One row: experts, their bytes, the seconds of a load and the peak over those bytes.

    The loads have a process of their own, whose heap has no room left over from writing the bundle.
    """
    model = base()
    with tempfile.TemporaryDirectory() as parent, get_context("spawn").Pool(1) as process:
        small, folder = Path(parent, "small"), Path(parent, "bundle")
        write_bundle(model, small, 1)
        size = write_bundle(model, folder, experts)
        peak, seconds = process.apply(measure_loads, (small, folder, repeats))
    row = {"experts": experts, "bytes": size, "load_s": round(seconds, 3)}
    return row | {"peak_over_experts": None if peak is None else round(peak / size, 3)}


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line of JSON per number of experts, then the ratio of the times; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks loading", description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, nargs=2, default=[100, 200], metavar="N")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args(argv)
    rows = [measure(experts, arguments.repeats) for experts in arguments.experts]
    for row in rows:
        print(json.dumps(row | {"threads": torch.get_num_threads()}))
    print(json.dumps({"time_ratio": round(rows[1]["load_s"] / rows[0]["load_s"], 3)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
