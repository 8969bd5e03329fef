"""Executes the runs of a comparison, one after another or side by side, and updates the report after each."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch

from cram.atomic import write_json
from cram.compare.comparison import Comparison, Run
from cram.compare.processes import Job, run_side_by_side
from cram.console import ProgressBar
from cram.report.schema import MethodReport, Report, validate_report
from cram.streams import Stream


def run_comparison(comparison: Comparison, jobs: int = 1, shown: bool = True) -> Report:
    """Execute every run that is not done and write one report.

    Args:
        comparison: The comparison.
        jobs: Number of runs at a time. Each run has its own process and its share of the threads. With 1, all
            runs happen in this process.
        shown: True if progress is printed.

    Raises:
        ValueError: If `jobs` is not positive, or the folder of a run belongs to another configuration.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    stream = comparison.load_stream(comparison.first_seed)
    board = Board(comparison, stream, jobs, shown)
    if jobs == 1:
        for run in board.runs:
            if run.seed > comparison.first_seed and run.entry == comparison.entries[0]:
                stream = comparison.load_stream(run.seed)
            board.announce(run)
            run.execute(stream, shown)
            board.update({run.name})
    else:
        waiting = [
            Job(run.name, run.execute, (), run.after.name if run.after else None) for run in board.runs
        ]
        board.announce_all()
        run_side_by_side(waiting, jobs, board.update)
    assert board.report is not None
    return board.report


class Board:
    """The progress of a comparison, and the report over its finished runs.

    Attributes:
        runs: All runs, seed by seed, in the order of the entries.
        report: The newest report. None before the first run is done.
    """

    def __init__(self, comparison: Comparison, stream: Stream, jobs: int, shown: bool) -> None:
        self.runs = [Run(comparison, e, seed) for seed in comparison.all_seeds for e in comparison.entries]
        self.report: Report | None = None
        self._comparison, self._stream_name = comparison, stream.name
        self._jobs, self._shown = jobs, shown
        self._done: set[str] = set()
        before = self._tasks_done()
        self._before = before
        self._bar = ProgressBar("compare", len(self.runs) * len(stream.tasks) - before, shown and jobs > 1)

    def announce(self, run: Run) -> None:
        """Print which run begins and, if a run was timed already, the remaining time."""
        self._bar.done = self._tasks_done() - self._before
        left = f"; all: {self._bar.line('tasks')}" if self._bar.done else ""
        if self._shown:
            print(f"== run {len(self._done) + 1} of {len(self.runs)}: {run.name}{left}", flush=True)

    def announce_all(self) -> None:
        """Print what runs side by side."""
        if self._shown:
            names = "; ".join(run.name for run in self.runs)
            print(f"== {len(self.runs)} runs, {self._jobs} at a time: {names}", flush=True)

    def update(self, done: Set[str]) -> None:
        """Count the finished tasks. Write the report if `done` (names of runs) has grown."""
        if self._bar.shown and (fresh := self._tasks_done() - self._before - self._bar.done):
            self._bar.advance(fresh, f"{len(self._done | done)} of {len(self.runs)} runs done")
        if done - self._done:
            self._done |= done
            self._write()

    def _tasks_done(self) -> int:
        return sum(run.tasks_done for run in self.runs)

    def _write(self) -> None:
        """Report the seeds whose runs are all done. If there is none yet, report what the first seed has."""
        seeds = {str(seed): self._methods(seed) for seed in self._comparison.all_seeds}
        first = str(self._comparison.first_seed)
        whole = {seed: found for seed, found in seeds.items() if len(found) == len(self._comparison.entries)}
        shown = whole or {first: seeds[first]}
        if not shown.get(first):
            return
        settings = {
            **self._comparison.settings,
            "jobs": self._jobs,
            "threads": max(1, torch.get_num_threads() // self._jobs),
            "config": self._comparison.config.to_dict(),
        }
        if self._comparison.orders > 1:
            settings["orders"] = self._comparison.orders
        if self._comparison.found:
            settings["found"] = dict(self._comparison.found)
        found: dict[str, Any] = {"methods": shown["0"]} if list(shown) == ["0"] else {"seeds": shown}
        if (base := self._comparison.base(shown)) is not None:
            found["base"] = base
        self.report = validate_report({"stream": self._stream_name, **found, "settings": settings})
        write_json(self._comparison.out / "report.json", self.report)

    def _methods(self, seed: int) -> dict[str, MethodReport]:
        done = [run for run in self.runs if run.seed == seed and run.name in self._done]
        return {run.entry.name: run.report() for run in done}
