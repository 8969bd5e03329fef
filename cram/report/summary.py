"""Means over the seeds of a report, as arrays for the page and the pictures."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cram.report.schema import METRIC_NAMES, MethodReport, Report, by_seed

_LAYER = re.compile(r"\.(\d+)\.(?:.*\.)?([^.]+)$")


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds (0 for one seed)."""

    mean: float
    std: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of values, one value per seed."""
        mean = sum(values) / len(values)
        if len(values) == 1:
            return cls(mean, 0.0)
        return cls(mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)))


@dataclass(frozen=True)
class RoutingSummary:
    """Mean routing over seeds: gates [tasks, experts], accuracies [tasks] in percent.

    Entropies [tasks] are in nats, and NaN where a report does not have them.
    """

    tasks: list[str]
    experts: list[str]
    gates: NDArray[np.float64]
    group_accuracy: NDArray[np.float64]
    expert_accuracy: NDArray[np.float64]
    gate_entropy: NDArray[np.float64]


@dataclass(frozen=True)
class MethodSummary:
    """One method over all seeds.

    Attributes:
        matrices: [seeds, T, T] accuracies, NaN above the diagonal, each in the order of its own seed.
        matrix: [T, T] mean accuracies, NaN above the diagonal, of the seeds that learn the tasks in the first
            seed's order; `deviation` [T, T] likewise.
        finals: By task the accuracy after the last task, over all seeds.
        metrics: The five continual metrics, each with its spread.
        ranks: Projection -> [tasks, layers] mean ranks (NaN where a layer has no such module).
        groups: Task -> its instruction groups over the seeds, without repeats.
        ablation: True for an ablation of a method.
        told_task: True for a method that is told the task at test time.
        note: Description of the method; may be empty.
        stored_values, bundle_megabytes: Size of the bundle after the last task. None if not measured.
        kept_samples: Training samples that are kept of older tasks. None for a method that keeps none.
        peak_megabytes: Most memory that a run held. None if not measured.
        prefills: Passes of the base over a prompt. None if not measured.
        added_inference: Percentage by which answers take longer than on the bare base. None if not measured.
    """

    name: str
    tasks: list[str]
    matrices: NDArray[np.float64]
    matrix: NDArray[np.float64]
    deviation: NDArray[np.float64]
    finals: list[Spread]
    metrics: dict[str, Spread]
    parameters: Spread
    train_seconds: Spread
    eval_seconds: Spread
    parameters_per_task: dict[str, float]
    seconds_per_task: dict[str, float]
    ranks: dict[str, NDArray[np.float64]]
    groups: dict[str, list[int]]
    routing: RoutingSummary | None
    ablation: bool
    told_task: bool
    note: str
    stored_values: Spread | None
    bundle_megabytes: Spread | None
    kept_samples: Spread | None
    peak_megabytes: Spread | None
    prefills: Spread | None
    added_inference: Spread | None


def summarise(report: Report) -> list[MethodSummary]:
    """Return one summary per method, in the order of the report. The report must be valid."""
    seeds = list(by_seed(report).values())
    return [_summarise_method(name, [methods[name] for methods in seeds]) for name in seeds[0]]


def _summarise_method(name: str, runs: list[MethodReport]) -> MethodSummary:
    tasks = runs[0]["tasks"]
    entry = runs[0].get("entry")
    stored = [run["stored"] for run in runs if "stored" in run]
    times = [run["inference"] for run in runs if "inference" in run]
    matrices = np.stack([_square(run["matrix"]) for run in runs])
    alike = matrices[[run["tasks"] == tasks for run in runs]]
    return MethodSummary(
        name=name,
        tasks=tasks,
        matrices=matrices,
        matrix=alike.mean(axis=0),
        deviation=alike.std(axis=0, ddof=1) if len(alike) > 1 else np.zeros_like(alike[0]),
        finals=[Spread.of([run["matrix"][-1][run["tasks"].index(task)] for run in runs]) for task in tasks],
        metrics={metric: Spread.of([run[metric] for run in runs]) for metric in METRIC_NAMES},  # type: ignore[literal-required]
        parameters=Spread.of([run["parameters"]["total"] for run in runs]),
        train_seconds=Spread.of([run["seconds"]["train"] for run in runs]),
        eval_seconds=Spread.of([run["seconds"]["eval"] for run in runs]),
        parameters_per_task={t: _mean([run["parameters"]["per_task"][t] for run in runs]) for t in tasks},
        seconds_per_task={t: _mean([run["seconds"]["per_task"][t] for run in runs]) for t in tasks},
        ranks=_rank_grids(tasks, runs),
        groups={t: sorted({run["groups"][t] for run in runs if "groups" in run}) for t in tasks},
        routing=_summarise_routing(tasks, runs),
        ablation=entry is not None and entry["method"] != name,
        # A report without entries comes from a single run, not from a comparison.
        told_task=entry["told_task"] if entry is not None else name == "isolated",
        note=entry["note"] if entry is not None else "",
        stored_values=_spread([size["values"] for size in stored], runs),
        bundle_megabytes=_spread([size["bundle_bytes"] / 1e6 for size in stored], runs),
        kept_samples=_spread([run["kept_samples"] for run in runs if "kept_samples" in run], runs),
        peak_megabytes=_spread(
            [run["peak_memory_bytes"] / 1e6 for run in runs if "peak_memory_bytes" in run], runs
        ),
        prefills=_spread([time["prefills"] for time in times if "prefills" in time], runs),
        added_inference=_spread([100 * (time["adapted"] / time["base"] - 1) for time in times], runs),
    )


def _spread(values: Sequence[float], runs: Sequence[MethodReport]) -> Spread | None:
    """The spread, or None if a run lacks the value."""
    return Spread.of(values) if len(values) == len(runs) else None


def _square(rows: list[list[float]]) -> NDArray[np.float64]:
    square = np.full((len(rows), len(rows)), np.nan)
    for t, row in enumerate(rows):
        square[t, : t + 1] = row
    return square


def _rank_grids(tasks: list[str], runs: list[MethodReport]) -> dict[str, NDArray[np.float64]]:
    """Ranks by projection. A module's name ends in its projection and holds its layer number (the column)."""
    found: dict[str, dict[tuple[int, int], list[int]]] = {}
    for run in runs:
        for task, modules in run.get("ranks", {}).items():
            for module, rank in modules.items():
                layer, projection = _layer_and_projection(module)
                found.setdefault(projection, {}).setdefault((tasks.index(task), layer), []).append(rank)
    layers = 1 + max((layer for cells in found.values() for _, layer in cells), default=-1)
    grids = {}
    for projection, cells in found.items():
        grid = np.full((len(tasks), layers), np.nan)
        for place, ranks in cells.items():
            grid[place] = _mean(ranks)
        grids[projection] = grid
    return grids


def _layer_and_projection(module: str) -> tuple[int, str]:
    match = _LAYER.search(f".{module}")
    return (int(match.group(1)), match.group(2)) if match else (0, module)


def _summarise_routing(tasks: list[str], runs: list[MethodReport]) -> RoutingSummary | None:
    routings = [run["routing"] for run in runs if "routing" in run]
    if not routings:
        return None
    routed = [task for task in tasks if all(task in routing for routing in routings)]
    named = {expert for routing in routings for task in routed for expert in routing[task]["mean_gates"]}
    experts = [task for task in tasks if task in named] + sorted(named - set(tasks))
    gates = [
        [_mean([r[task]["mean_gates"].get(expert, 0.0) for r in routings]) for expert in experts]
        for task in routed
    ]
    return RoutingSummary(
        routed,
        experts,
        np.array(gates),
        np.array([_mean([r[task]["group_accuracy"] for r in routings]) for task in routed]),
        np.array([_mean([r[task]["expert_accuracy"] for r in routings]) for task in routed]),
        np.array([_mean([r[task].get("gate_entropy", math.nan) for r in routings]) for task in routed]),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
