"""The Markdown table of a comparison: `report.json` -> `table.md`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cram.config import CramConfig
from cram.report.columns import Column, decimals, in_order, ranks, shown_columns, spread_text
from cram.report.paired import differences
from cram.report.schema import METRIC_NAMES, Report, by_seed
from cram.report.summary import MethodSummary, Spread, summarise


def write_table(folder: Path, report: Report) -> Path:
    """Write `table.md` into a folder. `report` must be valid.

    Returns:
        The file's path.
    """
    file = folder / "table.md"
    file.write_text("\n".join(lines(report)) + "\n", encoding="utf-8")
    return file


def print_table(report: Report) -> None:
    """Print the metrics of all methods, as means over the seeds."""
    methods = in_order(summarise(report))
    width = max(len(method.name) for method in methods)
    print(" " * width + "".join(f"{name:>12}" for name in (*METRIC_NAMES, "parameters")))
    for method in methods:
        cells = "".join(f"{method.metrics[name].mean:12.2f}" for name in METRIC_NAMES)
        print(f"{method.name:{width}}{cells}{round(method.parameters.mean):12,}")


def lines(report: Report) -> list[str]:
    """Return the lines of the file: setting, methods, ablations, definitions, notes."""
    methods = in_order(summarise(report))
    columns = shown_columns(methods)
    seeds = list(by_seed(report))
    return [
        f"# {report['stream']}: {len(methods[0].tasks)} tasks, {_seeds(len(seeds))}",
        "",
        _setting(report.get("settings", {})),
        "",
        *_table(methods, columns),
        "",
        *[f"- {column.definition}" for column in columns],
        *_remarks(methods),
        "",
        *[f"- **{method.name}**: {method.note}" for method in methods if method.note],
        *_paired(report),
        *_found(report.get("settings", {})),
    ]


def _paired(report: Report) -> list[str]:
    """Every method against CRAM, seed by seed."""
    rows = []
    for each in differences(report):
        last = f"{decimals(each.last.mean)} ± {decimals(each.error)}"
        rows.append(f"| {each.name} | {last} | {each.ahead} of {each.seeds} |")
    heading = ["", "## Differences to CRAM, seed by seed", ""]
    columns = ["| method | Last, in points ± standard error | seeds ahead |", "|---|---:|---:|"]
    return [*heading, *columns, *rows] if rows else []


def _found(settings: Mapping[str, Any]) -> list[str]:
    """What the search chose for each method; it may have left a field as it is for all."""
    rows = []
    for method, own in settings.get("found", {}).items():
        fields = {**CramConfig().to_dict(), **settings.get("config", {}), **own}
        rows.append(f"| {method} | {fields['learning_rate']:.2g} | {fields['rank_max']} |")
    heading = ["", "## Settings found on a seed that is in no result", ""]
    columns = ["| method | learning rate | largest rank |", "|---|---:|---:|"]
    return [*heading, *columns, *rows] if rows else []


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds (mean ± sample standard deviation)"


def _setting(settings: dict[str, Any]) -> str:
    shown = {key: value for key, value in settings.items() if key not in ("config", "found")}
    shown.update(
        {key: settings["config"][key] for key in ("max_steps", "batch_size") if "config" in settings}
    )
    return ", ".join(f"{key} {value}" for key, value in shown.items() if value is not None)


def _table(methods: Sequence[MethodSummary], columns: Sequence[Column]) -> list[str]:
    place = ranks(methods)
    heading = ["place", "method", *(column.label for column in columns)]
    rows = ["| " + " | ".join(heading) + " |", "|---|---|" + "---:|" * len(columns)]
    for method in methods:
        first = [str(place.get(method.name, "–")), method.name]
        cells = [_cell(column, column.value(method)) for column in columns]
        rows.append("| " + " | ".join([*first, *cells]) + " |")
    return rows


def _cell(column: Column, value: Spread | None) -> str:
    if value is None:
        return "–"
    spread = spread_text(column, value)
    return column.show(value.mean) + (f" ± {spread}" if spread else "")


def _remarks(methods: Sequence[MethodSummary]) -> list[str]:
    """Name the methods without a place, with the reason."""
    told = [method.name for method in methods if method.told_task]
    remarks = [f"- No place: {', '.join(told)}, told the task at test time."] if told else []
    return remarks + (["- No place: ablations."] if any(method.ablation for method in methods) else [])
