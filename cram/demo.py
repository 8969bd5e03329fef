"""The demonstration: CRAM between its two bounds on the built-in stream and base, a small `cram compare`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cram.compare import SMALL_BASE, Comparison, run_comparison
from cram.config import CramConfig
from cram.entries import entries
from cram.loading import BUILTIN, Sources
from cram.scoring.schema import Report

METHODS_SHOWN = ("cram", "sequential", "isolated")


@dataclass(frozen=True)
class DemoSettings:
    """What the demonstration changes: fields of `CramConfig`, and samples a split."""

    config: dict[str, Any]
    limit: int | None = None


FULL = DemoSettings(SMALL_BASE)
QUICK = DemoSettings({**SMALL_BASE, "batch_size": 8, "max_steps": 4, "eval_batch_size": 8}, limit=8)


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
