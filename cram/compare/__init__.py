"""Methods and ablations on one stream, seed by seed."""

from cram.compare.board import run_comparison
from cram.compare.comparison import Comparison, Run
from cram.compare.entries import Entry, entries

__all__ = ["Comparison", "Entry", "Run", "entries", "run_comparison"]
