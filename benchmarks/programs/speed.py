"""`python -m benchmarks speed DIR`: the table of docs/speed.md from the results in a folder."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import goals, markdown
from benchmarks.machine import ROOT

PAGE = ROOT / "docs/speed.md"
MARKER = "speed"
TITLES = {"decode": "inference", "train": "training step"}
OTHERS = {"released": "released loop", "peft-9": "PEFT, one LoRA of rank 9", "packed": "packed PyTorch"}


def main(argv: Sequence[str]) -> int:
    """Write the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks speed", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder with a results.json")
    results = json.loads((parser.parse_args(argv).folder / "results.json").read_text())
    PAGE.write_text(markdown.replaced(PAGE.read_text(), MARKER, section(results)))
    return 0


def section(results: dict[str, Any]) -> list[str]:
    """Return the table: time of each way over the time of the frozen base linear alone."""
    environment = results["environment"]
    cpu = f"{environment['cpu']} with {environment['instructions']}, {environment['threads']} threads"
    where = environment["gpu"]["name"] if "gpu" in environment else cpu
    packages = environment["packages"]
    command = f"python -m benchmarks{' --quick' if results['suite'] == 'quick' else ''}"
    header = ["linear", "tokens", "type", *OTHERS.values(), "CRAM"]
    cells = [c for c in results["cases"] if c["rows"] and c["case"]["op"] in TITLES]
    rows = [_row(cell, environment["device"]) for cell in cells]
    return [
        f"`{command}` on {where} (torch {packages['torch']}): ten experts of rank 4 to 10 on one linear,",
        "median time divided by the time of the frozen linear alone.",
        "",
        *markdown.table(header, rows),
    ]


def _row(cell: dict[str, Any], device: str) -> list[str]:
    case = cell["case"]
    names = [*OTHERS, goals.ours(cell, device)]
    linear = f"{case['model']} {case['projection']}, {TITLES[case['op']]}"
    return [linear, str(case["tokens"]), case["dtype"], *(_ratio(cell, name) for name in names)]


def _ratio(cell: dict[str, Any], name: str) -> str:
    times = [cell["rows"].get(each, {}).get("median_us") for each in (name, "base")]
    return "–" if None in times else f"{times[0] / times[1]:.2f}"
