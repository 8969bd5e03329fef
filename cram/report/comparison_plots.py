"""The pictures of a comparison of many methods: accuracy over the stream, cost of accuracy, ablations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from cram.report.columns import human_count
from cram.report.style import HAIRLINE, INK, QUIET
from cram.report.summary import MethodSummary, Spread

FONT_SIZE = 9.0
# In points: width of a letter and height of a line in that size, and distance of a label from its point.
LETTER, LINE, AWAY = 5.4, 11.5, 7.0


def learnt_so_far(matrices: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean accuracy [seeds, T] on the tasks learnt so far, from matrices [seeds, T, T] with NaN above."""
    return np.asarray(np.nanmean(matrices, axis=2))


def forgotten_so_far(matrices: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean drop [seeds, T] of the earlier tasks from their best earlier accuracy."""
    fallen = np.zeros(matrices.shape[:2])
    for t in range(1, matrices.shape[1]):
        fallen[:, t] = (np.nanmax(matrices[:, :t, :t], axis=1) - matrices[:, t, :t]).mean(axis=1)
    return fallen


def ageing_curves(methods: Sequence[MethodSummary], colours: dict[str, str]) -> Figure:
    """Two panels over the stream: mean accuracy on tasks learnt so far, and mean drop of earlier tasks."""
    height = 0.22 * len(methods) + 2.6
    figure = Figure(figsize=(11.0, height), layout="constrained")
    panels = figure.subplots(1, 2)
    tasks = len(methods[0].tasks)
    for axes, title, measure in zip(
        panels,
        ("accuracy on the tasks learnt so far (%)", "forgotten of the earlier tasks (points)"),
        (learnt_so_far, forgotten_so_far),
        strict=True,
    ):
        ends = []
        for order, method in enumerate(methods):
            mean = measure(method.matrices).mean(axis=0)
            style = "--" if method.told_task else "-"
            layer = 3 + len(methods) - order
            axes.plot(np.arange(1, tasks + 1), mean, style, color=colours[method.name], lw=1.8, zorder=layer)
            ends.append(float(mean[-1]))
        axes.set_title(title, loc="left")
        axes.set_xlabel("tasks learnt so far")
        axes.set_xticks(range(1, tasks + 1, -(-tasks // 10)))
        axes.set_xlim(1, tasks + 0.34 * max(tasks - 1, 1))
        axes.grid(axis="y", color=HAIRLINE, lw=0.6)
        axes.spines[["top", "right", "left"]].set_visible(False)
        _label_ends(axes, float(tasks), ends, methods, colours, height)
    return figure


def _label_ends(
    axes: Axes,
    x: float,
    ends: list[float],
    methods: Sequence[MethodSummary],
    colours: dict[str, str],
    height: float,
) -> None:
    """Write each name beside its line's end. Names move up or down until none overlap. `height`: inches."""
    low, high = axes.get_ylim()
    # Axis titles and labels take about 0.9 inches of the figure's height.
    gap = (high - low) * LINE / (72 * (height - 0.9))
    order = sorted(range(len(ends)), key=lambda i: ends[i])
    places: list[float] = []
    for i in order:
        places.append(max(ends[i], places[-1] + gap) if places else ends[i])
    excess = max(0.0, places[-1] - max(high, max(ends))) if places else 0.0
    for k in reversed(range(len(places))):
        limit = places[k + 1] - gap if k + 1 < len(places) else places[k] - excess
        places[k] = min(places[k], limit)
    step = 0.03 * (axes.get_xlim()[1] - axes.get_xlim()[0])
    for place, i in zip(places, order, strict=True):
        colour = colours[methods[i].name]
        axes.plot([x, x + step], [ends[i], place], color=colour, lw=0.7, clip_on=False)
        axes.text(x + 1.3 * step, place, methods[i].name, color=colour, va="center", fontsize=FONT_SIZE)
    axes.set_ylim(min(low, *places) if places else low, high)


def tradeoff(methods: Sequence[MethodSummary], colours: dict[str, str]) -> Figure:
    """Last accuracy against trained values kept (log) and against seconds of training."""
    figure = Figure(figsize=(11.0, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    lasts = [method.metrics["last"] for method in methods]
    _scatter(left, [method.parameters for method in methods], lasts, methods, colours)
    _scatter(right, [method.train_seconds for method in methods], lasts, methods, colours)
    left.set_xscale("log")
    counts = [method.parameters.mean for method in methods]
    left.set_xlim(min(counts) / 1.6, max(counts) * 1.9)
    left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_count(value)))
    left.xaxis.set_minor_locator(NullLocator())
    left.set_xlabel("trained values kept")
    right.set_xlabel("seconds of training, all tasks")
    right.margins(x=0.16)
    left.set_title("accuracy on all tasks at the end (%)", loc="left")
    left.margins(y=0.12)
    figure.canvas.draw()
    for axes, values in ((left, counts), (right, [method.train_seconds.mean for method in methods])):
        _label_points(axes, list(zip(values, [last.mean for last in lasts], strict=True)), methods, colours)
    return figure


def _scatter(
    axes: Axes,
    across: Sequence[Spread],
    up: Sequence[Spread],
    methods: Sequence[MethodSummary],
    colours: dict[str, str],
) -> None:
    for x, y, method in zip(across, up, methods, strict=True):
        colour = colours[method.name]
        face = "white" if method.told_task else colour
        axes.errorbar(x.mean, y.mean, yerr=y.std or None, color=colour, lw=1.0, zorder=2)
        axes.plot(x.mean, y.mean, "o", ms=7.5, mfc=face, mec=colour, mew=1.6, zorder=3)
    axes.grid(color=HAIRLINE, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _label_points(
    axes: Axes,
    points: Sequence[tuple[float, float]],
    methods: Sequence[MethodSummary],
    colours: dict[str, str],
) -> None:
    """Write each name on the first side of its point where it covers no point and no other name."""
    scale = 72 / axes.figure.dpi
    centres = [tuple(float(v) * scale for v in axes.transData.transform(point)) for point in points]
    taken = [(x - AWAY, y - AWAY, x + AWAY, y + AWAY) for x, y in centres]
    for own, ((x, y), method) in enumerate(zip(centres, methods, strict=True)):
        width = LETTER * len(method.name)
        others = taken[:own] + taken[own + 1 :]
        sides = [
            (x + AWAY, y - LINE / 2),
            (x - AWAY - width, y - LINE / 2),
            (x - width / 2, y + AWAY),
            (x - width / 2, y - AWAY - LINE),
            *((x + AWAY, y - LINE / 2 + k * LINE) for k in (1.0, -1.0, 2.0, -2.0, 3.0, -3.0)),
        ]
        boxes = [(a, b, a + width, b + LINE) for a, b in sides]
        box = next((box for box in boxes if not any(_overlap(box, other) for other in others)), boxes[0])
        taken.append(box)
        axes.annotate(
            method.name,
            points[own],
            xytext=(box[0] - x, box[1] + LINE / 2 - y),
            textcoords="offset points",
            va="center",
            color=colours[method.name],
            fontsize=FONT_SIZE,
        )


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def ablation_bars(whole: MethodSummary, ablations: Sequence[MethodSummary]) -> Figure:
    """Change of Last and of Forgetting, seed by seed, if one idea of a method is switched off."""
    figure = Figure(figsize=(10.0, 0.42 * len(ablations) + 1.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(ablations))
    for axes, title, measure in zip(
        panels, ("change of Last", "change of Forgetting"), (learnt_so_far, forgotten_so_far), strict=True
    ):
        own = measure(whole.matrices)[:, -1]
        changes = [Spread.of(list(measure(other.matrices)[:, -1] - own)) for other in ablations]
        means = [change.mean for change in changes]
        axes.barh(places, means, height=0.55, color="#6fa4c9")
        axes.errorbar(means, places, xerr=[change.std for change in changes], fmt="none", ecolor=INK, lw=1.0)
        axes.axvline(0, color=QUIET, lw=0.9)
        reach = max([abs(change.mean) + change.std for change in changes] + [1.0])
        for place, change in zip(places, changes, strict=True):
            edge = change.mean + (change.std if change.mean >= 0 else -change.std)
            side = "left" if change.mean >= 0 else "right"
            offset = 0.03 * reach * (1 if change.mean >= 0 else -1)
            text = f"{change.mean:+.1f}".replace("-", "−")
            axes.text(edge + offset, place, text, ha=side, va="center", fontsize=FONT_SIZE)
        axes.set_xlim(-1.3 * reach, 1.3 * reach)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_title(f"{title} (points)", loc="left")
        axes.spines[["top", "right", "left"]].set_visible(False)
    panels[0].set_yticks(places, [method.name for method in ablations])
    panels[0].invert_yaxis()
    return figure
