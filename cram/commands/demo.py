"""`cram demo`: a small `cram compare` on the built-in stream and base.

CRAM stands beside one LoRA for all tasks and beside one LoRA per task that is told the task.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cram.commands.options import add_device, add_dtype, refuse_several_processes
from cram.compare.board import run_comparison
from cram.compare.comparison import SMALL_BASE, Comparison
from cram.compare.entries import entries
from cram.config import CramConfig
from cram.loading import BUILTIN, Sources, default_device
from cram.report.examples import gather_examples
from cram.report.page import write_page
from cram.report.schema import Report
from cram.report.table import print_table
from cram.streams import load_stream

METHODS_SHOWN = ("cram", "sequential", "isolated")


@dataclass(frozen=True)
class DemoSettings:
    """What the demonstration changes: fields of `CramConfig`, samples per split, and tests per task."""

    config: dict[str, Any]
    limit: int | None = None
    tests: int | None = None


# Small batches learn more in little time. The results in docs/results.md use batches of 16 and all samples.
FULL = DemoSettings({**SMALL_BASE, "batch_size": 8, "max_steps": 80}, tests=128)
QUICK = DemoSettings({**SMALL_BASE, "batch_size": 8, "max_steps": 4, "eval_batch_size": 8}, limit=8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--out", default="runs/demo", help="folder (default: runs/demo)")
    parser.add_argument("--seeds", default=1, type=int, metavar="N", help="number of seeds (default: 1)")
    parser.add_argument(
        "--methods", nargs="+", help=f"methods to compare (default: {' '.join(METHODS_SHOWN)})"
    )
    parser.add_argument("--quick", action="store_true", help="a few steps on a few samples")
    jobs = "number of runs side by side (default: on a CPU three for two threads, else one)"
    parser.add_argument("--jobs", type=int, metavar="N", help=jobs)
    add_dtype(parser)
    add_device(parser)


def run(arguments: argparse.Namespace) -> None:
    """Run the demonstration; print the table, write the page."""
    refuse_several_processes("demo")
    out = Path(arguments.out)
    settings = QUICK if arguments.quick else FULL
    report = run_demo(
        out,
        seeds=arguments.seeds,
        methods=arguments.methods or METHODS_SHOWN,
        settings=settings,
        dtype=arguments.dtype,
        device=arguments.device,
        jobs=arguments.jobs,
    )
    print_table(report)
    examples = gather_examples(out, load_stream(BUILTIN, 0, settings.limit))
    print(f"report: {write_page(out, examples)}")


def run_demo(
    out: str | Path,
    *,
    seeds: int = 1,
    methods: Sequence[str] = METHODS_SHOWN,
    settings: DemoSettings = FULL,
    dtype: str = "float32",
    device: str | None = None,
    jobs: int | None = None,
    progress: bool = True,
) -> Report:
    """Run the methods on every seed and write one report.

    Args:
        out: Folder of the demonstration.
        seeds: See `Comparison`.
        methods: Names in `cram.methods.METHODS`.
        settings: Configuration and size.
        dtype: Of the base.
        device: See `load_model`.
        jobs: Runs at a time. None takes three for every two threads of a CPU, because a second thread makes a
            run of this small base only a third faster. On another device it takes one.
        progress: Whether progress is printed.

    Raises:
        ValueError: If a method is unknown or repeated, or there is no seed, or `jobs` is not positive.
        FileNotFoundError: If the package was installed without the base.
    """
    comparison = Comparison(
        out=Path(out),
        entries=tuple(entries(methods, ())),
        seeds=seeds,
        config=CramConfig.from_dict(settings.config),
        sources=Sources(BUILTIN, dtype=dtype),
        limit=settings.limit,
        tests=settings.tests,
        device=device,
    )
    if jobs is None:
        on_cpu = torch.device(device or default_device()).type == "cpu"
        most = torch.get_num_threads() * 3 // 2 if on_cpu else 1
        jobs = min(most, seeds * len(comparison.entries))
    return run_comparison(comparison, jobs, shown=progress)
