"""`python -m benchmarks predictions [DIR]`: the table of predictions, or which held in a folder's results."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks import markdown, predictions
from benchmarks.machine import ROOT

NOTES = ROOT / "benchmarks" / "NOTES.md"
MARKER = "predictions"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the table into NOTES.md, or print what held; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks predictions", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="results of the GPU command (default: none)")
    folder = parser.parse_args(argv).folder
    if folder is None:
        NOTES.write_text(markdown.replaced(NOTES.read_text(), MARKER, predictions.table()))
    else:
        print("\n".join(predictions.verdicts(predictions.load(folder))))
    return 0
