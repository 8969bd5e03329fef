"""Series of small whole numbers from public statistics, for bar charts.

Each series has whole values from 1 to 9 in the stated unit. Training and test series come from different
countries, industries or years of a table; "free" series come from tables that no task uses.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

LOW, HIGH, SHORTEST = 1, 9, 4


def collect_tables(folder: Path) -> list[dict[str, Any]]:
    """The series of all tables in the data folder of vega-datasets."""
    return [*_fertility(folder), *_unemployment(folder), *_weather(folder), *_electricity(folder)]


def _series(title: str, name: str, split: str, values: Iterable[float]) -> list[dict[str, Any]]:
    """The longest runs of a series whose rounded values lie from `LOW` to `HIGH`."""
    runs: list[list[int]] = [[]]
    for value in values:
        whole = round(value)
        if LOW <= whole <= HIGH:
            runs[-1].append(whole)
        else:
            runs.append([])
    return [
        {"title": title, "name": name, "split": split, "values": run} for run in runs if len(run) >= SHORTEST
    ]


def _rows(file: Path) -> Sequence[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


def _fertility(folder: Path) -> list[dict[str, Any]]:
    """Children per woman, every five years. Every fourth country is for testing."""
    rows = json.loads((folder / "gapminder.json").read_text(encoding="utf-8"))
    countries = sorted({row["country"] for row in rows})
    found = []
    for i, country in enumerate(countries):
        values = [row["fertility"] for row in rows if row["country"] == country]
        found += _series("children per woman", country, "test" if i % 4 == 0 else "train", values)
    return found


def _unemployment(folder: Path) -> list[dict[str, Any]]:
    """Percent without work, by month. Every fourth industry is for testing."""
    rows = json.loads((folder / "unemployment-across-industries.json").read_text(encoding="utf-8"))
    series: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        series[row["series"]].append(row["rate"])
    found = []
    for i, (name, values) in enumerate(sorted(series.items())):
        found += _series("percent without work", name, "test" if i % 4 == 0 else "train", values)
    return found


def _weather(folder: Path) -> list[dict[str, Any]]:
    """Wind in metres per second, mean of each week. Training: 2012 to 2014; test: 2015."""
    rows = _rows(folder / "seattle-weather.csv")
    found = []
    for year in ("2012", "2013", "2014", "2015"):
        days = [float(row["wind"]) for row in rows if row["date"].startswith(year)]
        weeks = [sum(days[i : i + 7]) / 7 for i in range(0, len(days) - 6, 7)]
        found += _series("wind speed", f"Seattle {year}", "test" if year == "2015" else "train", weeks)
    return found


def _electricity(folder: Path) -> list[dict[str, Any]]:
    """Electricity of Iowa by source, in five terawatt hours per year."""
    series: dict[str, list[float]] = defaultdict(list)
    for row in _rows(folder / "iowa-electricity.csv"):
        series[row["source"]].append(float(row["net_generation"]) / 5000)
    return [run for name, values in series.items() for run in _series("electricity", name, "free", values)]
