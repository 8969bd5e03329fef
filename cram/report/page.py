"""The report page of a run folder: `report.json` -> `report.html` and PNG pictures beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from cram.report import plots
from cram.report.columns import (
    Column,
    best_value,
    decimals,
    human_count,
    in_order,
    is_compared,
    ranks,
    shown_columns,
    spread_text,
)
from cram.report.schema import Report, by_seed, validate_report
from cram.report.summary import MethodSummary, Spread, summarise

FIGURES = {
    "matrices": (
        "Accuracy after every step",
        "Read a row to see what the model can do after learning that task; read a column downwards to see "
        "how the accuracy on one task changes while later tasks are learnt. The bottom row is what remains.",
    ),
    "curves": (
        "What is kept, task by task",
        "Each panel follows one task from the step where it was learnt (first point) to the end of the "
        "stream; a falling line is forgetting. Shaded: one standard deviation over seeds, if several.",
    ),
    "ageing": (
        "How the methods age",
        "Left: the mean accuracy on all tasks learnt so far, after every task. Right: how far the earlier "
        "tasks have fallen by then from their best accuracy before; flat at 0 is no forgetting. Dashed: told "
        "the task at test time.",
    ),
    "tradeoff": (
        "What the accuracy costs",
        "The accuracy on all tasks after the last one, against the trained values kept (left) and the "
        "seconds of training (right); up and to the left is better. Lines: one standard deviation over "
        "seeds, if several. Hollow: told the task at test time.",
    ),
    "ablations": (
        "What each idea of CRAM is worth",
        "Each bar is CRAM with one idea switched off, less CRAM itself on the same seed: left the accuracy "
        "after the last task, right the forgetting. Lines: one standard deviation over seeds, if several.",
    ),
    "ranks": (
        "Ranks of the experts",
        "The rank that adaptive instantiation gave to each task's expert in every adapted module (row: task, "
        "column: decoder layer, panel: projection). A darker cell is a larger rank.",
    ),
    "routing": (
        "Routing of the test samples after the last task",
        "Left: the mean weight that samples of a task give to each expert; experts outside the sample's "
        "group have exactly 0. Right: how many samples reach the group of their task, and how many give "
        "their own task's expert the largest weight. Sharing experts within a group is intended.",
    ),
    "cost": ("Cost", "Parameters kept by each method, and its wall-clock time over the whole stream."),
}


def write_page(run_folder: Path) -> Path:
    """Write `report.html` (self-contained) and one PNG per picture into a run folder.

    Args:
        run_folder: Folder with a `report.json` that follows `cram.report.schema`.

    Returns:
        The page's path.

    Raises:
        ValueError: If `report.json` is absent, is not JSON or does not follow the schema.
    """
    source = run_folder / "report.json"
    if not source.is_file():
        raise ValueError(f"run folder must contain report.json, got {run_folder} without one")
    try:
        data = json.loads(source.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{source} must be JSON, got {error}") from error
    report = validate_report(data)
    methods = summarise(report)
    figures = plots.draw_all(methods)
    for name, figure in figures.items():
        plots.save_png(figure, run_folder / f"{name}.png")
    svgs = {name: plots.to_svg(figure) for name, figure in figures.items()}
    page = run_folder / "report.html"
    page.write_text(_render(report, methods, svgs), encoding="utf-8")
    return page


def _render(report: Report, methods: list[MethodSummary], svgs: dict[str, str]) -> str:
    environment = Environment(
        loader=PackageLoader("cram.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    tasks = methods[0].tasks
    ordered, columns = in_order(methods), shown_columns(methods)
    return environment.get_template("page.html.jinja").render(
        stream=report["stream"],
        tasks=tasks,
        seeds=list(by_seed(report)),
        tables=[
            _table("Results", ordered, [column for column in columns if column.better]),
            _table("Cost", ordered, [column for column in columns if not column.better]),
        ],
        compared=sum(map(is_compared, methods)),
        told=[method.name for method in ordered if method.told_task],
        ablated=any(method.ablation for method in methods),
        notes=[{"name": method.name, "text": method.note} for method in ordered if method.note],
        finals=_final_rows(ordered),
        figures=[_figure(name, svg, methods) for name, svg in svgs.items()],
        expert_rows=[_expert_row(m, task) for m in methods if m.ranks and not m.ablation for task in tasks],
        settings=json.dumps(report["settings"], indent=2) if "settings" in report else "",
    )


def _table(title: str, methods: Sequence[MethodSummary], columns: list[Column]) -> dict[str, Any]:
    """One row per method, with its place and its colour in the pictures."""
    place = ranks(methods)
    rows = [
        {
            "name": method.name,
            "place": place.get(method.name, "–"),
            "colour": plots.colours_of(methods).get(method.name, ""),
            "cells": [_cell(column, method, best_value(methods, column)) for column in columns],
        }
        for method in methods
    ]
    return {"title": title, "columns": columns, "rows": rows}


def _final_rows(methods: Sequence[MethodSummary]) -> list[dict[str, Any]]:
    """One row per method: its accuracy on each task after the last task."""
    columns = [Column("", "", partial(_final, i), decimals, 1) for i in range(len(methods[0].tasks))]
    best = [best_value(methods, column) for column in columns]
    return [
        {"name": m.name, "cells": [_cell(column, m, top) for column, top in zip(columns, best, strict=True)]}
        for m in methods
    ]


def _final(index: int, method: MethodSummary) -> Spread:
    return Spread(float(method.matrix[-1, index]), float(method.deviation[-1, index]))


def _cell(column: Column, method: MethodSummary, best: float | None) -> dict[str, Any]:
    """A table cell. The best of several compared methods is marked."""
    value = column.value(method)
    if value is None:
        return {"text": "–", "spread": "", "best": False}
    return {
        "text": column.show(value.mean),
        "spread": spread_text(column, value),
        "best": round(value.mean, 2) == best and is_compared(method),
    }


def _figure(name: str, svg: str, methods: Sequence[MethodSummary]) -> dict[str, str]:
    kind, _, method = name.partition("_")
    title, caption = FIGURES[kind]
    several = sum(bool(m.ranks) for m in methods) > 1
    return {
        "title": f"{title} ({method})" if method and several else title,
        "caption": caption,
        "svg": svg,
        "file": f"{name}.png",
    }


def _expert_row(method: MethodSummary, task: str) -> dict[str, str]:
    row = method.tasks.index(task)
    ranks = [grid[row][grid[row] == grid[row]] for grid in method.ranks.values()]
    count = sum(len(values) for values in ranks)
    return {
        "method": method.name,
        "task": task,
        "groups": ", ".join(map(str, method.groups[task])) or "–",
        "rank": f"{sum(values.sum() for values in ranks) / count:.2f}" if count else "–",
        "parameters": human_count(method.parameters_per_task[task]),
        "seconds": f"{method.seconds_per_task[task]:,.1f}",
    }
