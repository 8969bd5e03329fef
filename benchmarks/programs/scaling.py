"""The growth of the cost with experts, ranks, tokens and width, and a whole model's memory at 1000 tasks.

Each curve changes one number of one linear. A table that says "modelled" is computed from the shapes alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import floors, machine, markdown, plots, suite
from benchmarks.cases import MODELS, QUERY_WIDTH, Case
from benchmarks.goals import ours
from benchmarks.report import added, duration
from benchmarks.timing import Limits

CANDIDATES = ("base", "released", "peft", "packed", "cram cpu", "cram triton", "cram native")
MASTER_BYTES = 4  # experts and centroids are kept in float32
TYPICAL_RANK = 7
UNIT = 10  # experts; fewer experts add less time than two medians differ


@dataclass(frozen=True)
class Curve:
    """A curve over one number: the cases, and the number of each case."""

    name: str
    cases: tuple[Case, ...]
    values: tuple[int, ...]


def curves(device: torch.device, size: str) -> list[Curve]:
    """Return the curves: `toy`, `quick` or `full`."""
    cuda = device.type == "cuda"
    width, tokens = (64, 8) if size == "toy" else (4096, 16) if cuda else (2048, 8)
    start = Case("decode", f"square-{width}", "q", "10x8", tokens, tokens, "bfloat16")
    most = 8192 if cuda else 1024
    step = 1 if size == "full" else 2
    few = (1, 10, 64) if size == "quick" else (1, 2, 4, 8, 10, 16, 32, 64)
    experts = (1, 4) if size == "toy" else (*few, 100, 1000)
    ranks = (2, 4) if size == "toy" else (1, 2, 4, 8, 16, 32, 64)[::step]
    counts = (1, 8) if size == "toy" else tuple(t for t in (1, 8, 64, 256, 1024, 8192) if t <= most)[::step]
    widths = (32, 64) if size == "toy" else (512, 1024, 2048, 4096, 8192)[::step]

    def curve(name: str, values: tuple[int, ...], change: Any) -> Curve:
        return Curve(name, tuple(replace(start, **change(value)) for value in values), values)

    return [
        curve("experts of rank 8", experts, lambda e: {"stream": f"{e}x8"}),
        curve("rank of each of 10 experts", ranks, lambda r: {"stream": f"10x{r}"}),
        curve("tokens", counts, lambda t: {"op": "forward", "tokens": t, "segments": 1}),
        curve("width", widths, lambda d: {"model": f"square-{d}"}),
    ]


def measure(device: torch.device, size: str) -> dict[str, Any]:
    """Measure all curves."""
    limits = Limits(0.0, 2, 2, sets=2) if size == "toy" else Limits(0.3, 5, 20)
    ceilings = machine.ceilings(device, small=size == "toy")
    found: dict[str, Any] = {"environment": machine.environment(device), "size": size, "curves": []}
    for curve in curves(device, size):
        cells = []
        for case, value in zip(curve.cases, curve.values, strict=True):
            cells.append({"value": value, **suite.measure(case, device, limits, ceilings, CANDIDATES)})
            print(f"{curve.name} {value}: {suite.line(cells[-1])}", flush=True)
        found["curves"].append({"name": curve.name, "cells": cells})
    return found


def expert_bytes(case: Case) -> float:
    """Bytes of the experts' weights that a call reads."""
    return sum(phase.moved_bytes for phase in floors.expert_phases(replace(case, tokens=0)))


def growth(cells: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float, float]]:
    """Return (experts, time, bytes). Time and bytes are those beyond the first cell, per `UNIT` experts.

    The first cell is subtracted and not the base linear, because a layer with few experts can be faster than
    the base linear. Time is measured as a share of the base linear's time in the same cell.
    """
    points = [
        (cell["value"], share, expert_bytes(Case(**cell["case"])))
        for cell in cells
        if (share := added(cell, name, "base")) is not None
    ]
    unit = next(((s, b) for value, s, b in points[1:] if value >= UNIT), points[-1][1:] if points else None)
    if unit is None or unit[0] <= points[0][1]:
        return []
    _, first_share, first_bytes = points[0]
    share, moved = unit[0] - first_share, unit[1] - first_bytes
    return [(value, (s - first_share) / share, (b - first_bytes) / moved) for value, s, b in points[1:]]


def model_bytes(model: str, tasks: int) -> int:
    """Bytes of a whole model's experts (q, k, v, o in every layer) and centroids, from the shapes alone."""
    shape = MODELS[model]
    widths = sum(sum(shape.linear(p)[:2]) for p in "qkvo")
    return shape.layers * tasks * MASTER_BYTES * (TYPICAL_RANK * widths + QUERY_WIDTH)


def lines(found: dict[str, Any]) -> list[str]:
    """Return the page line by line."""
    environment = found["environment"]
    device = environment["device"]
    setting = f"Commit {environment['commit']}, load {environment['load']}. Cells: median time (added)."
    shown = [f"# Scaling, {environment['machine']}", "", setting, ""]
    for curve in found["curves"]:
        names = [n for n in CANDIDATES if any("median_us" in c["rows"].get(n, {}) for c in curve["cells"])]
        shown += [f"## {curve['name'].capitalize()}", ""]
        rows = [[str(cell["value"]), *(_cell(cell, name) for name in names)] for cell in curve["cells"]]
        shown += [*markdown.table([curve["name"], *names], rows), ""]
    name = ours(found["curves"][0]["cells"][0], device)
    table = growth(found["curves"][0]["cells"], name)
    if table:
        shown += [
            f"## Time of {name} and bytes of the experts beyond the first row's; {UNIT} experts are 1",
            "",
        ]
        rows = [[str(value), f"{us:.1f} x", f"{moved:.1f} x"] for value, us, moved in table]
        shown += [*markdown.table(["experts", "time", "bytes"], rows), ""]
    shown += [f"## Memory of a whole model (modelled: rank {TYPICAL_RANK}, float32, q, k, v and o)", ""]
    streams = (10, 100, 1000)
    rows = [
        [model, *(f"{model_bytes(model, tasks) / 1e9:.2f} GB" for tasks in streams)]
        for model in MODELS
        if model != "toy"
    ]
    return shown + markdown.table(["model", *(f"{tasks} tasks" for tasks in streams)], rows)


def _cell(cell: dict[str, Any], name: str) -> str:
    row = cell["rows"].get(name, {})
    if "median_us" not in row:
        return "failed" if "failed" in row else "–"
    share = added(cell, name, "base")
    return duration(row["median_us"]) + ("" if name == "base" or share is None else f" ({share:+.0%})")


def draw(file: Path, found: dict[str, Any]) -> Path:
    """One panel per curve: time over the base linear's time. Both axes are logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    for axis, curve in zip(axes.flat, found["curves"], strict=True):
        for name in CANDIDATES[1:]:
            points = [
                (c["value"], s + 1) for c in curve["cells"] if (s := added(c, name, "base")) is not None
            ]
            if points:
                axis.plot(
                    *zip(*points, strict=True), "o-", color=plots.COLOURS[name], label=name, markersize=4
                )
        axis.set(xscale="log", yscale="log", xlabel=curve["name"])
        values = [cell["value"] for cell in curve["cells"]]
        axis.set_xticks(values, [str(value) for value in values])
        axis.minorticks_off()
        low, high = axis.get_ylim()
        fine = (1.2, 1.5) if high < 10 * low else ()
        decades = [factor * 10**power for power in (-2, -1, 0, 1, 2) for factor in (1, 2, 5)]
        ticks = [t for t in (*decades, *fine) if low <= t <= high]
        axis.set_yticks(ticks, [f"{t:g}" for t in ticks])
        axis.axhline(1, color="black", linewidth=1)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8, frameon=False)
    figure.suptitle(f"Time over the frozen base linear's, {found['environment']['machine']}")
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return file


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the curves, and write scaling.json, scaling.md and scaling.png."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="every second point")
    parser.add_argument("--toy", action="store_true", help="tiny shapes: whether it runs, not how fast")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: by machine)")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    size = "toy" if arguments.toy else "quick" if arguments.quick else "full"
    out = arguments.out or machine.results_folder() / machine.machine_name(device)
    out.mkdir(parents=True, exist_ok=True)
    found = measure(device, size)
    (out / "scaling.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "scaling.md").write_text("\n".join(lines(found)) + "\n")
    print(f"table: {out / 'scaling.md'}\nplot: {draw(out / 'scaling.png', found)}")
    return 0
