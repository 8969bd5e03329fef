"""The report page of a run folder: `report.json` -> `report.html` and PNG pictures beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
from cram.report.examples import Example, by_task
from cram.report.schema import Report, by_seed, validate_report
from cram.report.summary import MethodSummary, Spread, summarise
from cram.report.words import conclusion, description

FIGURES = {
    "matrices": (
        "Accuracy after every step",
        "A row shows the accuracy on each task after one task was learnt. A column, read downwards, shows "
        "the accuracy on one task while later tasks are learnt. The bottom row is the accuracy at the end.",
    ),
    "curves": (
        "What is kept, task by task",
        "Each panel follows one task from its own training (first point) to the end of the stream. A falling "
        "line means forgetting. Shaded: one standard deviation over seeds, if there are several.",
    ),
    "ageing": (
        "Accuracy and forgetting along the stream",
        "Left: after every task, the mean accuracy on all tasks learnt so far. Right: the mean drop of the "
        "earlier tasks from their best accuracy; a flat line at 0 means no forgetting. Dashed: methods that "
        "are told the task at test time.",
    ),
    "tradeoff": (
        "What the accuracy costs",
        "The accuracy on all tasks after the last task, against the trained values kept (left) and the "
        "seconds of training (right). Up and to the left is better. Lines: one standard deviation over "
        "seeds, if there are several. Hollow: methods that are told the task at test time.",
    ),
    "ablations": (
        "What each idea of CRAM is worth",
        "Each bar is the difference between CRAM without one idea and the whole of CRAM, on the same seed. "
        "Left: accuracy after the last task. Right: forgetting. Lines: one standard deviation over seeds, if "
        "there are several.",
    ),
    "ranks": (
        "Ranks of the experts",
        "The rank of each task's expert in every adapted module (row: task, column: decoder layer, panel: "
        "projection). Adaptive instantiation chooses the ranks. A darker cell is a larger rank.",
    ),
    "routing": (
        "Routing of the test samples after the last task",
        "Left: the mean weight of each expert for the samples of a task. Experts outside the sample's group "
        "have weight 0. Right: the share of samples that reach the group of their task, and the share whose "
        "largest weight is on their own task's expert. Sharing experts within a group is intended. "
        "The entropy of a sample's weights is 0 with one expert in use, and 0.69 with two in equal parts.",
    ),
    "cost": ("Cost", "Parameters kept by each method, and its wall-clock time over the whole stream."),
}


def write_page(run_folder: Path, examples: Sequence[Example] = ()) -> Path:
    """Write `report.html` (self-contained) and one PNG per picture into a run folder.

    Args:
        run_folder: Folder with a `report.json` that follows `cram.report.schema`.
        examples: See `cram.report.examples.gather_examples`.

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
    page.write_text(_render(report, methods, svgs, examples), encoding="utf-8")
    return page


def _render(
    report: Report, methods: list[MethodSummary], svgs: dict[str, str], examples: Sequence[Example]
) -> str:
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
        conclusion=conclusion(methods, report.get("base")),
        examples=by_task(examples),
        tasks=tasks,
        seeds=list(by_seed(report)),
        orders=len({tuple(run["tasks"]) for runs in by_seed(report).values() for run in runs.values()}),
        tables=[
            _table("Results", ordered, [column for column in columns if column.better]),
            _table("Cost", ordered, [column for column in columns if not column.better]),
        ],
        compared=sum(map(is_compared, methods)),
        told=[method.name for method in ordered if method.told_task],
        ablated=any(method.ablation for method in methods),
        notes=[{"name": method.name, "text": method.note} for method in ordered if method.note],
        finals=_final_rows(ordered) + _base_rows(tasks, report.get("base")),
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


def _base_rows(tasks: Sequence[str], base: Mapping[str, float] | None) -> list[dict[str, Any]]:
    """The row of the untrained base, if its accuracies are known."""
    if base is None:
        return []
    cells = [
        {"text": decimals(value), "spread": "", "best": False} for value in (base[task] for task in tasks)
    ]
    return [{"name": "base, untrained", "cells": cells}]


def _final(index: int, method: MethodSummary) -> Spread:
    return method.finals[index]


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
        "alt": description(name, methods),
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
