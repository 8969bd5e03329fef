"""The demonstration: CRAM, sequential and isolated LoRA on the built-in stream and the built-in base.

    OUT/seeds/<seed>/<method>/    one run folder each
    OUT/report.json, report.html  all of them together

Sequential LoRA gets the rank at which its trainable values equal those of CRAM's average expert. A
demonstration that was stopped goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cram.atomic import write_json
from cram.base import base_folder
from cram.config import CramConfig
from cram.learner import ContinualLearner
from cram.loading import BUILTIN, Sources
from cram.methods import METHODS
from cram.scoring.schema import MethodReport, Report, validate_report
from cram.streams import Stream, load_stream


@dataclass(frozen=True)
class DemoSettings:
    """What the demonstration changes for the small base: fields of `CramConfig` and samples a split."""

    config: dict[str, Any] = field(default_factory=dict)
    limit: int | None = None


# The base is a thousandth of a real one and takes a larger step; one epoch is 80 steps.
FULL = DemoSettings({"learning_rate": 3e-3, "batch_size": 16, "eval_batch_size": 128})
QUICK = DemoSettings({"learning_rate": 3e-3, "batch_size": 8, "max_steps": 4, "eval_batch_size": 8}, limit=8)


def run_demo(
    out: str | Path,
    *,
    seeds: int = 1,
    methods: Sequence[str] = tuple(METHODS),
    settings: DemoSettings = FULL,
    dtype: str = "float32",
    device: str | None = None,
    progress: bool = True,
) -> Report:
    """Run the methods on every seed and write one report.

    Args:
        out: Folder of the demonstration.
        seeds: The seeds 0 .. seeds - 1 are run; a seed decides the stream's pictures and all training.
        methods: Names in `cram.methods.METHODS`.
        settings: Configuration and size.
        dtype: Of the base.
        device: See `load_model`.
        progress: Whether progress is printed.

    Raises:
        ValueError: If a method is unknown or repeated, or there is no seed.
        FileNotFoundError: If the package was installed without the base.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    if not methods or len(set(methods)) != len(methods) or set(methods) - METHODS.keys():
        raise ValueError(f"methods must be distinct names among {sorted(METHODS)}, got {list(methods)}")
    base_folder()
    ordered = [name for name in METHODS if name in methods]
    config = CramConfig.from_dict(settings.config)
    done: dict[str, dict[str, MethodReport]] = {}
    for seed in range(seeds):
        stream = load_stream(BUILTIN, seed, settings.limit)
        done[str(seed)] = {}
        rank = config.rank_max
        for name in ordered:
            values = {"seed": seed, **(same_size(rank, config) if name == "sequential" else {})}
            learner = _learner(
                Path(out), name, stream, config, values, dtype, settings.limit, device, progress
            )
            done[str(seed)][name] = learner.run()["methods"][name]
            if name == "cram":
                rank = equal_rank(learner, done[str(seed)][name])
            if seeds == 1:
                report = _write(Path(out), stream.name, {"methods": done[str(seed)]}, config)
        if seeds > 1:
            report = _write(Path(out), stream.name, {"seeds": done}, config)
    return report


def same_size(rank: int, config: CramConfig) -> dict[str, int]:
    """The fields of `CramConfig` that give a single LoRA this rank."""
    return {
        "rank_max": rank,
        "rank_min": min(config.rank_min, rank),
        "buffer_rank": max(config.buffer_rank, rank),
    }


def equal_rank(learner: ContinualLearner, report: MethodReport) -> int:
    """The rank at which one LoRA has as many trainable values as an average task added, rounded."""
    counts = report["parameters"]["per_task"].values()
    per_rank = sum(module.in_features + module.out_features for module in learner.cram.modules.values())
    return max(1, round(sum(counts) / len(counts) / per_rank))


def _learner(
    out: Path,
    method: str,
    stream: Stream,
    config: CramConfig,
    values: dict[str, Any],
    dtype: str,
    limit: int | None,
    device: str | None,
    progress: bool,
) -> ContinualLearner:
    own = CramConfig.from_dict({**config.to_dict(), **values})
    if progress:
        print(f"== {method}, seed {own.seed}", flush=True)
    model, processor, encoder = Sources(BUILTIN, dtype=dtype).load(device)
    return ContinualLearner(
        model,
        processor,
        stream,
        own,
        method,
        out=out / "seeds" / str(own.seed) / method,
        encoder=encoder,
        progress=progress,
        settings={
            "model": BUILTIN,
            "clip": None,
            "dtype": dtype,
            "stream": BUILTIN,
            "limit": limit,
            "data_root": None,
        },
    )


def _write(out: Path, stream: str, found: dict[str, Any], config: CramConfig) -> Report:
    settings = {"model": "built-in base", "config": config.to_dict()}
    report = validate_report({"stream": stream, **found, "settings": settings})
    write_json(out / "report.json", report)
    return report
