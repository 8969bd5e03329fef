"""`cram demo`: CRAM between its two bounds on the built-in stream and base, a small `cram compare`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cram.commands.options import add_device, add_dtype, refuse_several_processes
from cram.compare.board import run_comparison
from cram.compare.comparison import SMALL_BASE, Comparison
from cram.compare.entries import entries
from cram.config import CramConfig
from cram.loading import BUILTIN, Sources
from cram.report.examples import gather_examples
from cram.report.page import write_page
from cram.report.schema import Report
from cram.report.table import print_table
from cram.streams import load_stream

METHODS_SHOWN = ("cram", "sequential", "isolated")


@dataclass(frozen=True)
class DemoSettings:
    """What the demonstration changes: fields of `CramConfig`, and samples per split."""

    config: dict[str, Any]
    limit: int | None = None


FULL = DemoSettings(SMALL_BASE)
QUICK = DemoSettings({**SMALL_BASE, "batch_size": 8, "max_steps": 4, "eval_batch_size": 8}, limit=8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--out", default="runs/demo", help="folder (default: runs/demo)")
    parser.add_argument("--seeds", default=1, type=int, metavar="N", help="number of seeds (default: 1)")
    parser.add_argument("--methods", nargs="+", help=f"default: {' '.join(METHODS_SHOWN)}")
    parser.add_argument("--quick", action="store_true", help="a few steps on a few samples")
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
        progress: Whether progress is printed.

    Raises:
        ValueError: If a method is unknown or repeated, or there is no seed.
        FileNotFoundError: If the package was installed without the base.
    """
    comparison = Comparison(
        out=Path(out),
        entries=tuple(entries(methods, ())),
        seeds=seeds,
        config=CramConfig.from_dict(settings.config),
        sources=Sources(BUILTIN, dtype=dtype),
        limit=settings.limit,
        device=device,
    )
    return run_comparison(comparison, shown=progress)
