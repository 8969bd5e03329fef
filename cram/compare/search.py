"""The learning rate and size at which a method does best, found on a seed that is in no result.

Every method has the same trials: `RATES` times the comparison's learning rate, with `SIZES` times its ranks.
The best mean accuracy after the last task (Last) decides, then the smaller size. Ablations have the settings
of the whole method.

    OUT/search/<rate>-<size>/     a comparison of its own for each trial
    OUT/search.json               all trials and what was found
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cram.atomic import read_json, write_json
from cram.compare.comparison import Comparison, Run
from cram.compare.processes import Job, run_side_by_side
from cram.config import CramConfig

SEED = 1000
RATES, SIZES = (1 / 3, 1.0, 3.0), (1.0, 2.0)
RESULT = "search.json"
FOUND, TRIALS = "found", "trials"


@dataclass(frozen=True)
class Trial:
    """One method with one learning rate and size, as a run of a comparison of its own."""

    run: Run
    fields: dict[str, Any]

    def learn(self, shown: bool = False) -> None:
        """Learn and test what is missing."""
        self.run.learn(self.run.comparison.load_stream(SEED), shown)

    @property
    def outcome(self) -> dict[str, Any]:
        """Fields of the configuration, Last, and the count of trained values."""
        method = read_json(self.run.folder / "report.json")["methods"][self.run.entry.method]
        return {**self.fields, "last": method["last"], "parameters": method["parameters"]["total"]}


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
    trials = list(_trials(comparison))
    if jobs == 1:
        for count, trial in enumerate(trials):
            _tell(shown, f"== trial {count + 1} of {len(trials)}: {_name(trial)}")
            trial.learn(shown)
    else:
        waiting = [Job(_name(t), t.learn, (), _before(t, trials)) for t in trials]
        run_side_by_side(waiting, jobs, lambda done: None)
    outcomes: dict[str, list[dict[str, Any]]] = {}
    for trial in trials:
        outcomes.setdefault(trial.run.entry.method, []).append(trial.outcome)
    found = {method: best(each) for method, each in outcomes.items()}
    write_json(comparison.out / RESULT, {"seed": SEED, TRIALS: outcomes, FOUND: found})
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


def _trials(comparison: Comparison) -> Iterator[Trial]:
    """The trials of one setting after another, in each of them the entries in their order, CRAM first."""
    entries = tuple(entry for entry in comparison.entries if entry.ablation is None)
    for size in SIZES:
        for rate in RATES:
            fields = scaled(comparison.config, rate, size)
            config = CramConfig.from_dict({**comparison.config.to_dict(), **fields})
            out = comparison.out / "search" / f"{rate:.2g}-{size:g}"
            tried = replace(comparison, entries=entries, config=config, out=out, orders=1)
            yield from (Trial(Run(tried, entry, SEED), fields) for entry in entries)


def _name(trial: Trial) -> str:
    return f"{trial.run.entry.name}, {trial.run.comparison.out.name}"


def _before(trial: Trial, trials: Sequence[Trial]) -> str | None:
    """The name of the trial of CRAM that decides this one's size, or None."""
    after = trial.run.after
    return None if after is None else next(_name(each) for each in trials if each.run == after)


def _tell(shown: bool, text: str) -> None:
    if shown:
        print(text, flush=True)
