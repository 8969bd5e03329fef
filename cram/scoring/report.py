"""The report page of a run folder: `report.json` -> `report.html` and PNG pictures beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from cram.scoring import plots
from cram.scoring.metrics import DEFINITIONS
from cram.scoring.schema import Report, by_seed, validate_report
from cram.scoring.summary import MethodSummary, Spread, summarise

METHOD_NOTES = {
    "cram": "One adaptive-rank LoRA expert a task, routed by instruction and image; no task id at test time.",
    "sequential": "One LoRA as large as an average expert, trained through all tasks: the lower bound.",
    "isolated": "One LoRA a task, chosen by the true task id at test time: the upper bound.",
}
# Methods that are told the task at test time are shown, but not compared with those that are not.
TOLD_THE_TASK = {"isolated"}
COST_DEFINITIONS = {
    "parameters": "Parameters = trained values kept after the last task.",
    "train": "Training = wall-clock seconds of training on all tasks.",
    "eval": "Evaluation = wall-clock seconds of all tests over the stream.",
}
# Key of a row -> its label and whether more is better.
METRIC_ROWS = {
    "last": ("Last (%)", True),
    "avg": ("Avg (%)", True),
    "mft": ("MFT (%)", True),
    "bwt": ("BWT", True),
    "forgetting": ("Forgetting", False),
}
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
    """Write `report.html` (self-contained) and one PNG a picture into a run folder.

    Args:
        run_folder: Folder with a `report.json` as `cram.scoring.schema` defines it.

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
        loader=PackageLoader("cram.scoring", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    colours = plots.method_colours([method.name for method in methods])
    tasks = methods[0].tasks
    return environment.get_template("report.html.jinja").render(
        stream=report["stream"],
        tasks=tasks,
        seeds=list(by_seed(report)),
        methods=[{"name": method.name, "colour": colours[method.name]} for method in methods],
        results=_result_rows(methods),
        told=[method.name for method in methods if method.name in TOLD_THE_TASK],
        notes=[{"name": m.name, "text": METHOD_NOTES[m.name]} for m in methods if m.name in METHOD_NOTES],
        finals=[_final_row(methods, i, task) for i, task in enumerate(tasks)],
        figures=[_figure(name, svg, methods) for name, svg in svgs.items()],
        expert_rows=[_expert_row(method, task) for method in methods if method.ranks for task in tasks],
        settings=json.dumps(report["settings"], indent=2) if "settings" in report else "",
    )


def _result_rows(methods: Sequence[MethodSummary]) -> list[dict[str, Any]]:
    rows = []
    for key, (label, more_is_better) in METRIC_ROWS.items():
        cells = _cells(methods, [method.metrics[key] for method in methods], more_is_better)
        rows.append({"label": label, "definition": DEFINITIONS[key], "cells": cells})
    costs = {
        "parameters": ("Parameters", [plots.human_count(method.parameters.mean) for method in methods]),
        "train": ("Training (s)", [f"{method.train_seconds.mean:,.1f}" for method in methods]),
        "eval": ("Evaluation (s)", [f"{method.eval_seconds.mean:,.1f}" for method in methods]),
    }
    for key, (label, texts) in costs.items():
        cells = [{"text": text, "spread": "", "best": False} for text in texts]
        rows.append({"label": label, "definition": COST_DEFINITIONS[key], "cells": cells})
    return rows


def _final_row(methods: Sequence[MethodSummary], index: int, task: str) -> dict[str, Any]:
    spreads = [Spread(float(m.matrix[-1, index]), float(m.deviation[-1, index])) for m in methods]
    return {"label": task, "cells": _cells(methods, spreads, more_is_better=True)}


def _cells(
    methods: Sequence[MethodSummary], spreads: Sequence[Spread], more_is_better: bool
) -> list[dict[str, Any]]:
    """Table cells; the best of the methods that are compared is marked, if there are several."""
    values = [round(spread.mean, 2) for spread in spreads]
    compared = [v for v, method in zip(values, methods, strict=True) if method.name not in TOLD_THE_TASK]
    best = (max if more_is_better else min)(compared) if len(compared) > 1 else None
    return [
        {
            "text": f"{value:.2f}".replace("-", "−"),
            "spread": f"{spread.std:.2f}" if spread.std else "",
            "best": value == best and method.name not in TOLD_THE_TASK,
        }
        for value, spread, method in zip(values, spreads, methods, strict=True)
    ]


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
        "parameters": plots.human_count(method.parameters_per_task[task]),
        "seconds": f"{method.seconds_per_task[task]:,.1f}",
    }
