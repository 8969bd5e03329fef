"""One comparison whose seeds or methods were run in several places: its reports become one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cram.atomic import read_json, write_json
from cram.report.schema import MethodReport, Report, by_seed, validate_report

# Settings of a place, which change no result but by rounding, and those that belong to single methods.
OF_A_PLACE = frozenset({"jobs", "threads"})
OF_METHODS = "found"
FILE = "report.json"
# What decides the size of a run, by `entry.sized_by_cram`.
SIZES = {True: "CRAM's average expert", False: "rank_max", None: "that of its kind"}


def merge_files(files: Sequence[str | Path], out: Path) -> Report:
    """Merge some `report.json` into that of a folder, which holds no runs.

    Raises:
        ValueError: As `merge`; if a file is no report, or the folder holds runs.
        OSError: If a file cannot be read or written.
    """
    if any((out / name).exists() for name in ("seeds", "tasks")):
        raise ValueError(
            f"the folder of merged reports must hold no runs, got {out}; name another with --out"
        )
    merged = merge([validate_report(read_json(Path(file))) for file in files])
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / FILE, merged)
    return merged


def merge(reports: Sequence[Report]) -> Report:
    """Put the seeds and methods of several reports into one.

    Args:
        reports: Reports of the same stream, base, tests and configuration.

    Returns:
        A report with `seeds`. Its settings are the first report's.

    Raises:
        ValueError: If the reports differ in stream or settings, also in settings or size rule of a method
            that several of them ran, two of them have one run with different accuracies, or a method lacks a
            seed that another has.
    """
    if not reports:
        raise ValueError("there must be at least one report, got none")
    first = reports[0]
    for report in reports[1:]:
        _same("stream", first["stream"], report["stream"])
        one, other = _settings(first), _settings(report)
        for name in sorted(one.keys() | other.keys()):
            _same(f"settings.{name}", one.get(name), other.get(name))
    seeds: dict[str, dict[str, MethodReport]] = {}
    sized: dict[str, object] = {}
    for report in reports:
        for seed, methods in by_seed(report).items():
            for name, method in methods.items():
                size = SIZES[method.get("entry", {}).get("sized_by_cram")]
                _same(f"size of {name}", sized.setdefault(name, size), size)
                _add(seeds.setdefault(seed, {}), name, method, seed)
    names = list(dict.fromkeys(name for methods in seeds.values() for name in methods))
    if lacking := [f"{n}, seed {s}" for s, methods in seeds.items() for n in names if n not in methods]:
        raise ValueError(f"every method must have every seed, got none of {'; '.join(lacking)}")
    ordered = {seed: {name: seeds[seed][name] for name in names} for seed in sorted(seeds, key=int)}
    base = _base(reports)
    found = _found(reports)
    settings = {**first.get("settings", {}), **({OF_METHODS: found} if found else {})}
    return validate_report(
        {
            "stream": first["stream"],
            **({} if base is None else {"base": base}),
            "seeds": ordered,
            "settings": settings,
        }
    )


def _settings(report: Report) -> dict[str, Any]:
    left_out = OF_A_PLACE | {OF_METHODS}
    return {name: value for name, value in report.get("settings", {}).items() if name not in left_out}


def _found(reports: Sequence[Report]) -> dict[str, Any]:
    """Method -> its own settings; refuses reports whose runs of a method have different ones."""
    found: dict[str, Any] = {}
    known: dict[str, dict[str, Any]] = {}
    for report in reports:
        settings = report.get("settings", {})
        own, common = settings.get(OF_METHODS, {}), settings.get("config", {})
        found |= own
        for run in {name for methods in by_seed(report).values() for name in methods}:
            # An ablation is named after its method.
            fields = {**common, **own.get(run.split(":")[0], {})}
            one = known.setdefault(run, fields)
            for name in sorted(one.keys() | fields.keys()):
                _same(f"settings.{OF_METHODS} of {run}, {name}", one.get(name), fields.get(name))
    return found


def _same(what: str, one: object, other: object) -> None:
    if one != other:
        raise ValueError(f"reports must have the same {what}, got {one!r} and {other!r}")


def _add(methods: dict[str, MethodReport], name: str, method: MethodReport, seed: str) -> None:
    known = methods.setdefault(name, method)
    if known["matrix"] != method["matrix"]:
        raise ValueError(f"a run must have one result, got two for {name}, seed {seed}")


def _base(reports: Sequence[Report]) -> dict[str, float] | None:
    """The untrained base's accuracies, the mean over all seeds; None where a report has none.

    A report holds the mean over its seeds alone, so reports that share some of their seeds, but not all, give
    none.
    """
    known: dict[frozenset[str], dict[str, float]] = {}
    for report in reports:
        if "base" not in report:
            return None
        known.setdefault(frozenset(by_seed(report)), report["base"])
    seeds = [seed for each in known for seed in each]
    if len(seeds) != len(set(seeds)):
        return None
    tasks = next(iter(known.values()))
    return {task: sum(len(s) * base[task] for s, base in known.items()) / len(seeds) for task in tasks}
