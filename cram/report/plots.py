"""The pictures of a run: accuracy matrices, forgetting curves, ranks, routing and cost.

Every function returns a figure. No function shows a figure or uses global state of matplotlib.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cram.report.columns import human_count, in_order
from cram.report.comparison_plots import ablation_bars, ageing_curves, tradeoff
from cram.report.style import HAIRLINE, INK, QUIET, SHADES, STYLE, method_colours
from cram.report.summary import MethodSummary, RoutingSummary

# Up to this many methods get a line in every task's panel.
FEW_METHODS = 4
# Up to this many columns get numbers in their cells.
MOST_LABELLED_COLUMNS = 12


def colours_of(methods: Sequence[MethodSummary]) -> dict[str, str]:
    """Return name -> colour of the methods that are no ablations. The order of methods does not matter."""
    return method_colours(sorted(method.name for method in methods if not method.ablation))


def draw_all(methods: Sequence[MethodSummary]) -> dict[str, Figure]:
    """Return file name without extension -> picture, for every picture that the run has data for.

    A few methods get panels and bars of their own; many methods share axes. Ablations have their own picture.
    """
    shown = [method for method in in_order(methods) if not method.ablation]
    ablations = [method for method in methods if method.ablation]
    own = colours_of(methods)
    many = len(shown) > FEW_METHODS
    with matplotlib.rc_context(STYLE):
        figures = {}
        if many:
            figures["ageing"] = ageing_curves(shown, own)
            figures["tradeoff"] = tradeoff(shown, own)
        whole = [m for m in shown if any(other.name.startswith(f"{m.name}:") for other in ablations)]
        if whole:
            figures["ablations"] = ablation_bars(whole[0], ablations)
        figures["matrices"] = accuracy_matrices(shown)
        if not many:
            figures["curves"] = forgetting_curves(shown)
        for method in shown:
            if method.ranks:
                figures[f"ranks_{method.name}"] = rank_maps(method)
            if method.routing is not None:
                figures[f"routing_{method.name}"] = routing_map(method.routing)
        if not many:
            figures["cost"] = cost_bars(shown)
    return figures


def save_png(figure: Figure, file: Path) -> None:
    """Write a figure as PNG at twice the screen's resolution."""
    with matplotlib.rc_context(STYLE):
        figure.savefig(file, dpi=200, facecolor="white")


def to_svg(figure: Figure) -> str:
    """Return a figure as an inline `<svg>` element."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def accuracy_matrices(methods: Sequence[MethodSummary]) -> Figure:
    """One heat map per method: row = after learning a task, column = accuracy on a task."""
    tasks = methods[0].tasks
    side = max(2.6, 0.52 * len(tasks))
    rows, columns = _balanced(len(methods), most_columns=int(13 // side))
    figure = Figure(figsize=(columns * side + 1.9, rows * (side + 1.3)), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for index, (axes, method) in enumerate(zip(grid, methods, strict=False)):
        first = index % columns == 0
        _heat_map(axes, method.matrix, tasks if first else [""] * len(tasks), tasks, 100.0, "{:.0f}")
        axes.set_title(f"{method.name}   last {method.metrics['last'].mean:.1f}", loc="left")
        axes.set_ylabel("after learning" if first else "")
        axes.set_xlabel("accuracy on (%)")
    for axes in grid[len(methods) :]:
        axes.set_visible(False)
    return figure


def forgetting_curves(methods: Sequence[MethodSummary]) -> Figure:
    """One panel per task: its accuracy from its own training to the end of the stream."""
    tasks = methods[0].tasks
    columns = min(len(tasks), 3 if len(tasks) <= 6 else 5)
    rows = math.ceil(len(tasks) / columns)
    colours = colours_of(methods)
    figure = Figure(figsize=(2.5 * columns + 1.0, 1.9 * rows + 0.9), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    steps = np.arange(1, len(tasks) + 1)
    for i, (axes, task) in enumerate(zip(panels, tasks, strict=False)):
        # The first method lies on top, because the report is about it.
        for order, method in enumerate(methods):
            mean, spread = method.matrix[:, i], method.deviation[:, i]
            style = {"color": colours[method.name], "zorder": 3 + len(methods) - order}
            axes.plot(steps, mean, lw=1.8, marker="o", ms=3.5, label=method.name, **style)
            axes.fill_between(
                steps, mean - spread, mean + spread, color=colours[method.name], alpha=0.15, lw=0
            )
        axes.set_title(task, loc="left")
        axes.set_ylim(-4, 104)
        axes.set_yticks([0, 50, 100])
        axes.set_xticks(steps)
        axes.grid(axis="y", color=HAIRLINE, lw=0.6)
        axes.spines[["top", "right", "left"]].set_visible(False)
    for axes in panels[len(tasks) :]:
        axes.set_visible(False)
    figure.supxlabel("tasks learnt so far", color=QUIET, fontsize=9.5)
    figure.supylabel("accuracy (%)", color=QUIET, fontsize=9.5)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False)
    return figure


def rank_maps(method: MethodSummary) -> Figure:
    """One heat map per projection: row = task, column = layer, value = rank of the task's expert."""
    grids = method.ranks
    layers = next(iter(grids.values())).shape[1]
    width = max(1.5, 0.42 * layers) if layers <= MOST_LABELLED_COLUMNS else 4.4
    rows, columns = _balanced(len(grids), most_columns=int(12 // width))
    figure = Figure(
        figsize=(columns * width + 2.4, rows * (0.36 * len(method.tasks) + 1.1)), layout="constrained"
    )
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    top = max(float(np.nanmax(grid)) for grid in grids.values())
    for index, (axes, (projection, grid)) in enumerate(zip(panels, grids.items(), strict=False)):
        names = method.tasks if index % columns == 0 else [""] * len(method.tasks)
        whole = bool(np.all(np.isnan(grid) | (grid == np.round(grid))))
        _heat_map(axes, grid, names, [str(i) for i in range(layers)], top, "{:.0f}" if whole else "{:.1f}")
        axes.set_title(f"{projection}   mean {np.nanmean(grid):.1f}", loc="left")
        axes.set_xlabel("layer")
        axes.tick_params(axis="x", rotation=0)
    for axes in panels[len(grids) :]:
        axes.set_visible(False)
    if layers > MOST_LABELLED_COLUMNS:
        shades = panels[0].collections[0]
        figure.colorbar(shades, ax=list(panels), label="rank", shrink=0.5).outline.set_visible(False)
    return figure


def routing_map(routing: RoutingSummary) -> Figure:
    """Row = task of the test samples, column = expert, value = mean gate of the expert."""
    height, width = routing.gates.shape
    figure = Figure(figsize=(0.62 * width + 4.4, 0.46 * height + 1.6), layout="constrained")
    axes, beside = figure.subplots(1, 2, width_ratios=[width, 3.2], sharey=True)
    _heat_map(axes, routing.gates, routing.tasks, routing.experts, 1.0, "{:.2f}")
    axes.set_ylabel("test samples of")
    axes.set_xlabel("mean gate of the expert learnt on")
    places = np.arange(height) + 0.5
    bars = (
        ("right group", routing.group_accuracy, -0.17, "#6fa4c9"),
        ("right expert first", routing.expert_accuracy, 0.17, "#123f66"),
    )
    for label, values, offset, colour in bars:
        beside.barh(places + offset, values, height=0.3, color=colour, label=label)
        for place, value in zip(places, values, strict=True):
            beside.text(value + 3, place + offset, f"{value:.0f}", va="center", fontsize=8, color=QUIET)
    for place, entropy in zip(places, routing.gate_entropy, strict=True):
        if not np.isnan(entropy):
            beside.text(132, place, f"{entropy:.2f}", va="center", fontsize=8, color=QUIET)
    if not np.isnan(routing.gate_entropy).all():
        beside.text(128, -0.1, "entropy\nof gates", va="bottom", fontsize=8, color=QUIET)
    beside.set_xlim(0, 118)
    beside.set_xticks([0, 50, 100])
    beside.set_xlabel("share of samples (%)")
    beside.tick_params(axis="y", labelleft=False)
    beside.spines[["top", "right"]].set_visible(False)
    beside.legend(loc="lower left", bbox_to_anchor=(0, 1.0), frameon=False, fontsize=8.5, borderaxespad=0.1)
    return figure


def cost_bars(methods: Sequence[MethodSummary]) -> Figure:
    """One bar per method: parameters kept after the last task, and seconds of training and evaluation."""
    figure = Figure(figsize=(9.2, 0.42 * len(methods) + 1.1), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    names = [method.name for method in methods]
    colours = [colours_of(methods)[name] for name in names]
    places = np.arange(len(methods))
    kept = [method.parameters.mean for method in methods]
    train = np.array([method.train_seconds.mean for method in methods])
    evaluation = np.array([method.eval_seconds.mean for method in methods])
    left.barh(places, kept, color=colours, height=0.55)
    right.barh(places, train, color=colours, height=0.55)
    right.barh(places, evaluation, left=train, color=colours, height=0.55, alpha=0.4)
    left.set_title("parameters kept", loc="left")
    right.set_title("seconds: training (dark), evaluation (light)", loc="left")
    _label_bars(left, kept, [human_count(value) for value in kept])
    _label_bars(
        right,
        list(train + evaluation),
        [f"{a:,.0f} + {b:,.0f}" for a, b in zip(train, evaluation, strict=True)],
    )
    left.set_yticks(places, names)
    left.invert_yaxis()
    return figure


def _balanced(panels: int, most_columns: int) -> tuple[int, int]:
    """Rows and columns for a number of panels, with rows of nearly equal length."""
    rows = math.ceil(panels / max(1, most_columns))
    return rows, math.ceil(panels / rows)


def _label_bars(axes: Axes, lengths: Sequence[float], labels: Sequence[str]) -> None:
    longest = max(lengths, default=0.0) or 1.0
    for place, (length, label) in enumerate(zip(lengths, labels, strict=True)):
        axes.text(length + 0.015 * longest, place, label, va="center", fontsize=9, color=INK)
    axes.set_xlim(0, 1.3 * longest)
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _heat_map(
    axes: Axes,
    values: NDArray[np.float64],
    row_names: Sequence[str],
    column_names: Sequence[str],
    top: float,
    number: str,
) -> None:
    """Cells on one shade scale from 0 to `top`. NaN cells stay empty, and dense maps have no numbers."""
    height, width = values.shape
    axes.pcolormesh(np.ma.masked_invalid(values), cmap=SHADES, vmin=0, vmax=top, edgecolors="white", lw=1.2)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.spines[:].set_visible(False)
    axes.set_yticks(np.arange(height) + 0.5, row_names)
    labelled = width <= MOST_LABELLED_COLUMNS
    step = 1 if labelled else math.ceil(width / 8)
    axes.set_xticks(np.arange(0, width, step) + 0.5, column_names[::step])
    if max(map(len, column_names)) > 3:
        axes.tick_params(axis="x", rotation=45)
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    if labelled:
        _write_numbers(axes, values, number.format, top)


def _write_numbers(
    axes: Axes, values: NDArray[np.float64], write: Callable[[float], str], top: float
) -> None:
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            colour = "white" if value > 0.58 * top else INK
            text = write(value) if value else "0"
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=colour, fontsize=8.5)
