"""Two results of the same cases side by side: what a change did on this machine.

    python -m benchmarks compare BEFORE AFTER      two files results.json, or the folders that hold them

Each time is divided by that of the frozen base in the same run, so that a faster or slower hour of the
machine does not count.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import goals, markdown
from benchmarks.report import BASES

NOISE = 0.03


def main(argv: Sequence[str]) -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    arguments = parser.parse_args(argv)
    print("\n".join(lines(load(arguments.before), load(arguments.after))))
    return 0


def load(path: Path) -> dict[str, Any]:
    """Return the results in a file, or in a folder's results.json."""
    file = path / "results.json" if path.is_dir() else path
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def lines(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return the table and a line that counts what became faster and slower beyond the noise."""
    known = {cell["name"]: _ratio(cell, before) for cell in before["cases"]}
    rows, changes = [], []
    for cell in after["cases"]:
        old, new = known.get(cell["name"]), _ratio(cell, after)
        if old is None or new is None:
            continue
        changes.append(new / old)
        rows.append([cell["name"], f"{old:.2f}", f"{new:.2f}", f"{new / old:.2f}"])
    if not rows:
        return ["no case is in both results"]
    slower = sum(change > 1 + NOISE for change in changes)
    faster = sum(change < 1 - NOISE for change in changes)
    middle = sorted(changes)[len(changes) // 2]
    return [
        *markdown.table(["case", "before, of the base", "after, of the base", "after / before"], rows),
        "",
        f"{len(rows)} cases: {faster} faster and {slower} slower by more than {NOISE:.0%}, "
        f"median {middle:.2f}",
    ]


def _ratio(cell: dict[str, Any], results: dict[str, Any]) -> float | None:
    """Time of this package over the base's, or None where a figure is missing."""
    if not cell["rows"]:
        return None
    name = goals.ours(cell, results["environment"]["device"])
    times = [cell["rows"].get(n, {}).get("median_us") for n in (name, BASES[cell["case"]["op"]])]
    return None if None in times else times[0] / times[1]
