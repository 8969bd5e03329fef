"""`python -m benchmarks speed DIR`: the tables of docs/speed.md, from results in a folder and from all."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import goals, markdown
from benchmarks.cases import SUITES
from benchmarks.machine import ROOT

PAGE = ROOT / "docs/speed.md"
MARKER, ACROSS = "speed", "processors"
RESULTS = ROOT / "benchmarks/results"
# Cells that the table over processors shows, as far as a processor's results have them.
SHOWN = (
    ("decode", "Qwen3-VL-2B", 1, "float32"),
    ("decode", "Qwen3-VL-2B", 8, "float32"),
    ("decode", "Qwen3-VL-2B", 64, "float32"),
    ("decode", "Qwen3-VL-2B", 1, "bfloat16"),
    ("decode", "Qwen3-VL-2B", 8, "bfloat16"),
    ("decode", "Qwen3-VL-2B", 64, "bfloat16"),
    ("train", "Qwen3-VL-2B", 1024, "float32"),
    ("train", "Qwen3-VL-2B", 1024, "bfloat16"),
)
TITLES = {"decode": "inference", "train": "training step"}
OTHERS = {"released": "released loop", "peft-9": "PEFT, one LoRA of rank 9", "packed": "packed PyTorch"}


def main(argv: Sequence[str]) -> int:
    """Write the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks speed", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder with a results.json")
    results = json.loads((parser.parse_args(argv).folder / "results.json").read_text())
    page = markdown.replaced(PAGE.read_text(), MARKER, section(results))
    PAGE.write_text(markdown.replaced(page, ACROSS, processors()))
    return 0


def processors() -> list[str]:
    """Return the table over all processors with committed results: this package, and PEFT of rank 9."""
    found = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*/results.json"))]
    found = [results for results in found if any(_both(results, *cell) != "–" for cell in SHOWN)]
    header = ["linear of width 2048", "tokens", "type", *map(_processor, found)]
    rows = []
    for op, model, tokens, dtype in SHOWN:
        shown = [_both(results, op, model, tokens, dtype) for results in found]
        rows.append([TITLES[op], str(tokens), dtype, *shown])
    return [
        "Time of CRAM (of PEFT's rank 9) over the time of the frozen linear.",
        "",
        *markdown.table(header, rows),
    ]


def _processor(results: dict[str, Any]) -> str:
    e = results["environment"]
    family = f" {e['family']}" if e.get("family") else ""
    return f"{e['cpu']}{family}, {e['instructions']}, {e['threads']} threads, {e['commit']}"


def _both(results: dict[str, Any], op: str, model: str, tokens: int, dtype: str) -> str:
    wanted = {
        "op": op,
        "model": model,
        "projection": "q",
        "stream": "trigap",
        "tokens": tokens,
        "dtype": dtype,
    }
    for cell in results["cases"]:
        if cell["rows"] and all(cell["case"][field] == value for field, value in wanted.items()):
            device = results["environment"]["device"]
            return f"{_ratio(cell, goals.ours(cell, device))} ({_ratio(cell, 'peft-9')})"
    return "–"


def section(results: dict[str, Any]) -> list[str]:
    """Return the table: time of each way over the time of the frozen base linear alone.

    The rows are the cases of the quick suite, whichever suite was run.
    """
    quick = {case.name for case in SUITES["quick", results["environment"]["device"]]}
    environment = results["environment"]
    cpu = f"{environment['cpu']} with {environment['instructions']}, {environment['threads']} threads"
    where = environment["gpu"]["name"] if "gpu" in environment else cpu
    packages = environment["packages"]
    command = f"python -m benchmarks{' --quick' if results['suite'] == 'quick' else ''}"
    header = ["linear", "tokens", "type", *OTHERS.values(), "CRAM"]
    measured = [cell for cell in results["cases"] if cell["rows"] and cell["name"] in quick]
    cells = [cell for cell in measured if cell["case"]["op"] in TITLES]
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
