"""Methods x seeds on one stream. Each run has a run folder of `ContinualLearner`; one report covers all runs.

    OUT/seeds/<seed>/<entry>/     the run folder, with comparison.json: what only a comparison measures
    OUT/seeds/<seed>/base/        accuracies and answers of the untrained base
    OUT/search.json               each method's settings, if they were searched for (`cram.compare.search`)
    OUT/report.json               all runs together, rewritten after each run

A comparison that was stopped goes on where it was. Runs may go side by side, each in a process of its own.
Each process has fewer threads then, so sums are split differently. Results differ by the rounding of these
sums only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from cram.atomic import read_json, write_json
from cram.bundle.runs import newest_bundle
from cram.compare.base_row import RESULT, measure_base
from cram.compare.entries import ABLATED, Entry
from cram.compare.inference_time import measure_inference
from cram.compare.peak_memory import PeakMemory
from cram.compare.seen_pictures import SeenPictures
from cram.config import CramConfig
from cram.families import family_of, match_linears
from cram.learning.learner import ContinualLearner
from cram.learning.replay import all_kept_samples
from cram.loading import BUILTIN, BUILTIN_REAL, Sources, default_device
from cram.methods import METHODS
from cram.report.examples import BASE
from cram.report.schema import MethodReport, Report, Stored, validate_report
from cram.streams import Stream, load_stream

EXTRA = "comparison.json"
# The built-in base is a thousandth of a real model and takes larger steps. An epoch of its stream has 80
# steps.
SMALL_BASE: dict[str, Any] = {"learning_rate": 3e-3, "batch_size": 16, "eval_batch_size": 128}
# Shipped base -> its settings. At width 512 a novelty threshold of 0.99 rejects random directions.
SETTINGS = {BUILTIN: SMALL_BASE, BUILTIN_REAL: {**SMALL_BASE, "overlap_ratio": 9.0}}
# Half of the steps and a quarter of the tests. One run takes about a minute on two cores.
QUICK: dict[str, Any] = {"max_steps": 40}
QUICK_TESTS, QUICK_SEEDS, FULL_SEEDS = 64, 2, 3


@dataclass(frozen=True)
class Comparison:
    """The settings of a comparison.

    Attributes:
        out: Folder of the comparison.
        entries: See `cram.compare.entries.entries`.
        seeds: Number of seeds. A seed decides the stream's pictures and all training.
        config: The configuration that the entries change. Its own seed is not used.
        sources: Sources of base and CLIP.
        stream: See `load_stream`, also for `limit` and `data_root`.
        tests: Maximum number of test samples per task. None keeps all.
        device: See `load_model`.
        orders: Number of task orders. Seed s learns the tasks in order s % orders (`Stream.in_order`).
        first_seed: The seeds are first_seed .. first_seed + seeds - 1.
        found: Method -> fields of the configuration that the method has in place of the common ones.
    """

    out: Path
    entries: tuple[Entry, ...]
    seeds: int
    config: CramConfig
    sources: Sources = Sources(BUILTIN)
    stream: str = BUILTIN
    limit: int | None = None
    data_root: str | None = None
    tests: int | None = None
    device: str | None = None
    orders: int = 1
    first_seed: int = 0
    found: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("seeds", "tests", "orders"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.first_seed < 0:
            raise ValueError(f"first_seed must be at least 0, got {self.first_seed}")

    @property
    def all_seeds(self) -> range:
        """The seeds of the comparison."""
        return range(self.first_seed, self.first_seed + self.seeds)

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings that all runs have in common beside the configuration."""
        names = ("stream", "limit", "data_root", "tests")
        sources = {name: getattr(self.sources, name) for name in ("model", "clip", "dtype")}
        return {**sources, **{name: getattr(self, name) for name in names}}

    def config_of(self, method: str) -> CramConfig:
        """Return the configuration that a method's entries change."""
        return CramConfig.from_dict({**self.config.to_dict(), **self.found.get(method, {})})

    def base(self, seeds: Iterable[str]) -> dict[str, float] | None:
        """Return task -> mean accuracy of the untrained base over some seeds, or None if one has none."""
        files = [self.out / "seeds" / seed / BASE / RESULT for seed in seeds]
        if not all(file.is_file() for file in files):
            return None
        found: list[dict[str, float]] = [read_json(file)["accuracies"] for file in files]
        return {task: sum(each[task] for each in found) / len(found) for task in found[0]}

    def load_stream(self, seed: int) -> Stream:
        """Load the stream of a seed in its order, with test splits cut to `tests` samples."""
        stream = load_stream(self.stream, seed, self.limit, self.data_root).in_order(seed % self.orders)
        if self.tests is None:
            return stream
        return Stream(
            stream.name, tuple(replace(task, test=task.test[: self.tests]) for task in stream.tasks)
        )


@dataclass(frozen=True)
class Run:
    """One entry with one seed.

    Attributes:
        comparison: The settings.
        entry: The method or ablation.
        seed: The seed.
        sized_by: The run of CRAM that decides this run's size, where it is one of another comparison.
    """

    comparison: Comparison
    entry: Entry
    seed: int
    sized_by: Run | None = None

    @property
    def name(self) -> str:
        """Name of entry and seed."""
        return f"{self.entry.name}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.comparison.out / "seeds" / str(self.seed) / self.entry.folder

    @property
    def after(self) -> Run | None:
        """The run of CRAM that decides this run's size, or None."""
        if not self.entry.follows_cram or Entry(ABLATED) not in self.comparison.entries:
            return None
        return self.sized_by or replace(self, entry=Entry(ABLATED))

    @property
    def tasks_done(self) -> int:
        """Number of tasks that have been learnt and tested."""
        return len(list(self.folder.glob("tasks/[0-9]*/result.json")))

    @property
    def is_done(self) -> bool:
        """True if everything has been measured."""
        return (self.folder / EXTRA).is_file()

    def learn(
        self, stream: Stream, shown: bool = False, seen: SeenPictures | None = None
    ) -> tuple[ContinualLearner, dict[str, Any]]:
        """Learn and test what is missing.

        Args:
            stream: The stream of this seed.
            shown: True if the learner's progress is printed.
            seen: Pictures of other runs with the same base. None begins without any, so that the seconds of
                all runs count the same work.

        Returns:
            The learner, and the fields in which its configuration differs from the comparison's.
        """
        comparison = self.comparison
        model, processor, encoder = comparison.sources.load(comparison.device)
        config = comparison.config_of(self.entry.method)
        average = None if self.after is None else self._average_rank(model)
        found = comparison.found.get(self.entry.method, {})
        changes = {**found, **self.entry.changes(config, len(stream.tasks), average)}
        chosen = {"method": self.entry.method, "seed": self.seed}
        learner = ContinualLearner(
            model,
            processor,
            stream,
            CramConfig.from_dict({**comparison.config.to_dict(), **changes, **chosen}),
            out=self.folder,
            encoder=encoder,
            progress=shown,
            settings={**comparison.settings, "order": self.seed % comparison.orders},
        )
        with (seen or SeenPictures()).shown_to(model):
            learner.run()
        return learner, changes

    def _average_rank(self, model: Any) -> int:
        """The rank that follows CRAM's run, times the share by which this method's own size differs."""
        comparison, cram = self.comparison, self.after
        assert cram is not None
        own = comparison.config_of(self.entry.method).rank_max
        its = cram.comparison.config_of(ABLATED).rank_max
        return max(1, round(equal_rank(model, comparison.config, cram.folder) * own / its))

    def execute(self, stream: Stream | None = None, shown: bool = False) -> None:
        """Learn, test and measure everything that is missing.

        Args:
            stream: The stream of this seed. None loads it.
            shown: True if the learner's progress is printed.
        """
        comparison = self.comparison
        stream = stream or comparison.load_stream(self.seed)
        fresh = not self.folder.exists()
        memory = PeakMemory(torch.device(comparison.device or default_device()))
        learner, changes = self.learn(stream, shown)
        peak = memory.bytes() if fresh else None
        if self.entry == comparison.entries[0]:
            measure_base(learner, self.folder.parent / BASE, shown)
        if not self.is_done:
            inference = measure_inference(learner)
            entry: dict[str, Any] = {
                "method": self.entry.method,
                "changes": changes,
                "told_task": METHODS[self.entry.method].told_task,
                "note": self.entry.note_of(comparison.config_of(self.entry.method), self.after is not None),
            }
            if self.entry.follows_cram:
                entry["sized_by_cram"] = self.after is not None
            extra: dict[str, Any] = {"entry": entry, "inference": inference}
            if peak is not None:
                extra["peak_memory_bytes"] = peak
            if (kept := learner.method.kept_samples) and len(stream.tasks) > 1:
                extra["kept_samples"] = len(all_kept_samples(stream, kept, self.seed))
            write_json(self.folder / EXTRA, extra)

    def report(self) -> MethodReport:
        """Return the report of the finished run."""
        report: Report = validate_report(read_json(self.folder / "report.json"))
        method = report["methods"][self.entry.method]
        method.update(read_json(self.folder / EXTRA))
        method["stored"] = stored(self.folder)
        return method


def equal_rank(model: Any, config: CramConfig, folder: Path) -> int:
    """Return the rank at which one LoRA has as many trained values as CRAM adds per task on average, rounded.

    Args:
        model: The base, not attached.
        config: The configuration, which names the adapted linears.
        folder: A finished run of CRAM.
    """
    counts = read_json(folder / "report.json")["methods"][ABLATED]["parameters"]["per_task"].values()
    linears = match_linears(model, family_of(model), config.target_projections).modules.values()
    per_rank = sum(linear.in_features + linear.out_features for _, linear in linears)
    return max(1, round(sum(counts) / len(counts) / per_rank))


def stored(folder: Path) -> Stored:
    """Return the size of a run's newest bundle."""
    bundle, _ = newest_bundle(folder)
    values = 0
    for file in sorted(bundle.rglob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            values += sum(prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
    sizes = (file.stat().st_size for file in bundle.rglob("*") if file.is_file())
    return {"values": values, "bundle_bytes": sum(sizes)}
