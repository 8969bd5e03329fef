"""The learning rate and size at which a method does best, found on a seed that is in no result.

Every method has the same trials: its ranks with each of `RATES` times the comparison's learning rate, then
each of `SIZES` times its ranks with the best of these rates. A trial learns the first `TASKS` tasks. The best
mean accuracy after the last of them decides, then the smaller size. Ablations have the settings of the whole
method.

    OUT/search/<rate>-<size>/     a comparison of its own for each setting
    OUT/search.json               all trials and what was found
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cram.atomic import read_json, write_json
from cram.compare.comparison import Comparison, Run
from cram.compare.entries import ABLATED, Entry
from cram.compare.processes import Job, run_side_by_side
from cram.compare.seen_pictures import SeenPictures
from cram.config import CramConfig
from cram.methods import METHODS
from cram.streams import Stream

SEED = 1000
RATES, SIZES = (1.0, 1 / 3, 1 / 9), (2.0,)
TASKS = 5
RESULT = "search.json"
FOUND, TRIALS = "found", "trials"


@dataclass(frozen=True)
class Trial:
    """One method with one learning rate and size, as a run of a comparison of its own.

    Attributes:
        run: The run.
        rate: Factor of the learning rate.
        fields: Fields of the configuration.
    """

    run: Run
    rate: float
    fields: dict[str, Any]

    @property
    def name(self) -> str:
        """Method, rate and size."""
        return f"{self.run.entry.name}, {self.run.comparison.out.name}"

    @property
    def outcome(self) -> dict[str, Any]:
        """Fields of the configuration, Last, and the count of trained values."""
        method = read_json(self.run.folder / "report.json")["methods"][self.run.entry.method]
        return {**self.fields, "last": method["last"], "parameters": method["parameters"]["total"]}

    def learn(
        self, stream: Stream | None = None, shown: bool = False, seen: SeenPictures | None = None
    ) -> None:
        """Learn and test what is missing; see `Run.learn`. Without a stream its own is loaded."""
        self.run.learn(stream or _stream(self.run.comparison), shown, seen)


def search(comparison: Comparison, jobs: int = 1, shown: bool = True) -> dict[str, dict[str, Any]]:
    """Run every trial that is not done and write `search.json`.

    Args:
        comparison: The comparison, whose methods are tried; ablations are not.
        jobs: Number of trials at a time.
        shown: True if progress is printed.

    Returns:
        Method -> fields of the configuration, for `Comparison.found`.

    Raises:
        ValueError: If the seed of the search is one of the comparison.
    """
    if SEED in comparison.all_seeds:
        raise ValueError(
            f"seeds must leave out {SEED}, on which settings are searched, got it in the results"
        )
    methods = [entry for entry in comparison.entries if entry.ablation is None]
    seen = SeenPictures()
    trials = [_trial(comparison, entry, rate, 1.0) for rate in RATES for entry in methods]
    _run(trials, jobs, shown, seen)
    larger = [
        _trial(comparison, entry, _best_rate(trials, entry), size) for size in SIZES for entry in methods
    ]
    _run(larger, jobs, shown, seen)
    outcomes = {
        entry.method: [trial.outcome for trial in (*trials, *larger) if trial.run.entry == entry]
        for entry in methods
    }
    found = {method: best(each) for method, each in outcomes.items()}
    write_json(comparison.out / RESULT, {"seed": SEED, TRIALS: outcomes, FOUND: found})
    return found


def read_found(file: Path, seeds: Container[int] = ()) -> dict[str, dict[str, Any]]:
    """Read what searches have found: method -> fields of the configuration, for `Comparison.found`.

    Args:
        file: The `search.json` of a search.
        seeds: The seeds of the comparison.

    Raises:
        ValueError: If the file is not that of a search, names an unknown method or a wrong field, or if its
            seed is one of the comparison.
        OSError: If it cannot be read.
    """
    record = read_json(file)
    found = record.get(FOUND) if isinstance(record, dict) else None
    if not isinstance(found, dict) or not all(isinstance(fields, dict) for fields in found.values()):
        raise ValueError(f"{file} must be the {RESULT} of a search, got no settings of methods in it")
    if record.get("seed") in seeds:
        raise ValueError(
            f"seeds must leave out {record['seed']}, on which {file} was found, got it in the results"
        )
    if unknown := sorted(found.keys() - METHODS.keys()):
        raise ValueError(f"{file} must name methods among {sorted(METHODS)}, got {unknown}")
    for fields in found.values():
        CramConfig.from_dict({**CramConfig().to_dict(), **fields})
    return found


def best(outcomes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the fields of the trial with the highest Last; of equal ones, the one with fewer values."""
    chosen = max(outcomes, key=lambda outcome: (outcome["last"], -outcome["parameters"]))
    return {name: value for name, value in chosen.items() if name not in ("last", "parameters")}


def scaled(config: CramConfig, rate: float, size: float) -> dict[str, Any]:
    """Return the fields of a trial: the configuration's learning rate and ranks, times the two factors."""
    ranks = {name: round(getattr(config, name) * size) for name in ("rank_max", "rank_min")}
    buffer = {"buffer_rank": max(config.buffer_rank, ranks["rank_max"])}
    return {"learning_rate": config.learning_rate * rate, **ranks, **buffer}


def _trial(comparison: Comparison, entry: Entry, rate: float, size: float) -> Trial:
    """The trial of one entry. A size that follows CRAM follows its trial with the same rate and size 1."""
    fields = scaled(comparison.config, rate, size)
    config = CramConfig.from_dict({**comparison.config.to_dict(), **fields})
    methods = tuple(each for each in comparison.entries if each.ablation is None)
    out = comparison.out / "search" / f"{rate:.2g}-{size:g}"
    tried = replace(comparison, entries=methods, config=config, out=out, orders=1)
    sized_by = None if size == 1 else _trial(comparison, Entry(ABLATED), rate, 1.0).run
    return Trial(Run(tried, entry, SEED, sized_by), rate, fields)


def _stream(comparison: Comparison) -> Stream:
    """What a trial learns: the same for all, whatever its settings."""
    stream = comparison.load_stream(SEED)
    return Stream(stream.name, stream.tasks[:TASKS])


def _best_rate(trials: Sequence[Trial], entry: Entry) -> float:
    own = [trial for trial in trials if trial.run.entry == entry]
    fields = best([trial.outcome for trial in own])
    return next(trial.rate for trial in own if trial.fields == fields)


def _run(trials: Sequence[Trial], jobs: int, shown: bool, seen: SeenPictures) -> None:
    """Run trials that do not depend on each other, but for the size that follows a run of CRAM."""
    if jobs == 1:
        stream = _stream(trials[0].run.comparison)
        for count, trial in enumerate(trials):
            if shown:
                print(f"== trial {count + 1} of {len(trials)}: {trial.name}", flush=True)
            trial.learn(stream, shown, seen)
        return
    waiting = []
    for trial in trials:
        first = next((each.name for each in trials if each.run == trial.run.after), None)
        waiting.append(Job(trial.name, trial.learn, (), first))
    run_side_by_side(waiting, jobs, lambda done: None)
