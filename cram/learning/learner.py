"""Learns a stream task after task, tests all tasks learnt so far, and goes on after an interruption.

A task is committed twice: a bundle after its training, and a result after its evaluation. Within a task there
are checkpoints of the training, and predictions are written as they are made. A run that was killed and is
started again loads the newest complete state and repeats nothing that was committed. The randomness of a task
depends on (seed, task) alone. So an interrupted run gives the same results as an uninterrupted run.

A launcher may start several processes (`cram.learning.parallel`). They divide every step's samples and
the test samples. The first one writes.
"""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from cram.atomic import write_json
from cram.attach import attach, attached
from cram.bundle.bundle import load, save
from cram.bundle.format import check_expert_name
from cram.config import CramConfig
from cram.console import ProgressBar, clock
from cram.learning.answers.generate import published_line, run_test
from cram.learning.answers.journal import remove_parts
from cram.learning.batches import Budget, EncodedSplit, pad_id
from cram.learning.checkpoint import TaskCheckpoints, Termination
from cram.learning.checks import check_samples, check_tests, few_steps
from cram.learning.foresight import check_pictureless
from cram.learning.parallel.processes import by_first, is_first
from cram.learning.parallel.sharding import shard
from cram.learning.replay import training_samples
from cram.learning.run_folder import (
    RESULT,
    RunFolder,
    digest_of,
    manifest_digest,
    model_identity,
    stream_identity,
    without_later,
)
from cram.learning.schedule import task_seed, total_steps
from cram.learning.training import train_task
from cram.methods import METHODS, Method
from cram.report.schema import Published, Report, Routing
from cram.streams.types import Stream

CACHE_BYTES = 4 << 30
CHECKPOINT_EVERY = 200


@dataclass(frozen=True)
class Work:
    """How the work of a run is done. The results do not depend on it.

    Attributes:
        forwards: Forwards per step and process (gradient accumulation).
        checkpoint_every: Steps between two checkpoints within a task; 0 for none.
        sharded: True divides the base's weights between the processes; see `cram.learning.parallel.sharding`.

    Raises:
        ValueError: If a number is too small.
    """

    forwards: int = 1
    checkpoint_every: int = CHECKPOINT_EVERY
    sharded: bool = False

    def __post_init__(self) -> None:
        if self.forwards < 1 or self.checkpoint_every < 0:
            raise ValueError(
                "forwards must be at least 1 and checkpoint_every at least 0, got "
                f"{self.forwards} and {self.checkpoint_every}"
            )


class ContinualLearner:
    """Trains and tests one method on one stream, in one run folder.

    Attributes:
        model: The attached model.
        cram: The model's handle, with experts and router.
        method: The method.
        folder: The run folder.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        stream: Stream,
        config: CramConfig,
        *,
        out: str | Path,
        encoder: Any = None,
        progress: bool = True,
        settings: dict[str, Any] | None = None,
        work: Work | None = None,
    ) -> None:
        """Check everything that can be checked before the first write.

        Args:
            model: A model of a known family. It is attached without experts, or plain if `encoder` is given.
            processor: The model's processor.
            stream: The tasks.
            config: The configuration. It names the method and decides all randomness.
            out: The run folder. It is new, empty or belongs to the same configuration.
            encoder: The CLIP that routes, for a plain model; see `cram.loading.load_encoder`.
            progress: True if progress bars and accuracies are printed.
            settings: Values that the run folder keeps and the report shows, beside the configuration.
            work: How the work is done; the results do not depend on it.

        Raises:
            ValueError: If the method is unknown, a task is empty or cannot be named or scored, the model is
                not ready, or `out` belongs to another configuration.
        """
        if config.method not in METHODS:
            raise ValueError(f"method must be one of {sorted(METHODS)}, got {config.method!r}")
        _check_stream(stream)
        if encoder is not None:
            attach(model, config, encoder, processor)
        self.model: Any = model
        self.cram = attached(model)
        if self.cram.config != config or self.cram.num_experts:
            raise ValueError(
                "model must be attached with the run's configuration and have no experts, "
                "got another configuration or a model with experts"
            )
        self.processor, self.stream, self.config = processor, stream, config
        self.method: Method = self.cram.method
        self.folder = RunFolder(out, stream)
        self._settings = {**(settings or {}), "config": config.to_dict()}
        self._identity = self._own_identity()
        self.folder.check_identity(self._identity)
        self._work = work or Work()
        if self._work.sharded:
            shard(self.model)
        self._shown = progress and is_first()
        self._ending = Termination()
        self._padding = pad_id(processor.tokenizer)
        self._interrupted = False
        self._budget = Budget(CACHE_BYTES)
        self._tests = {task.name: EncodedSplit(processor, task.test, self._budget) for task in stream.tasks}

    @property
    def identity(self) -> dict[str, Any]:
        """What a run must have in common with its folder: method, configuration, stream and model."""
        return self._identity

    def _own_identity(self) -> dict[str, Any]:
        values = self.config.to_dict()
        return {
            "method": values.pop("method"),
            "config": values,
            "stream": stream_identity(self.stream),
            "model": model_identity(self.cram, self.model),
        }

    def run(self) -> Report:
        """Learn and test every unfinished task, and write the report after each task.

        Returns:
            The report. The run folder keeps it as `report.json`.
        """
        if self._interrupted:
            raise ValueError(
                "run must start from a new learner after an interrupted training, got the interrupted learner"
            )
        with self.folder.writing() if is_first() else nullcontext(), self._ending:
            return self._run()

    def _run(self) -> Report:
        finished, trained = self._resume()
        if trained < len(self.stream.tasks):
            self._check_samples()
        report = self._report() if finished and finished == trained else None
        for index in range(finished, len(self.stream.tasks)):
            if index >= trained:
                self.learn(index)
            self.evaluate(index)
            report = self._report()
        assert report is not None
        return report

    def _check_samples(self) -> None:
        for task in self.stream.tasks:
            self.method.check_steps(task.name, total_steps(len(task.train), self.config))
        check_samples(self.stream, self.processor, self.model, self._shown)
        for line in (*check_pictureless(self.stream, self.method), *few_steps(self.stream, self.config)):
            if self._shown:
                print(f"cram: {line}", file=sys.stderr)

    def learn(self, index: int) -> None:
        """Train the method on a task and commit the state to its folder."""
        task = self.stream.tasks[index]
        name = f"{index + 1}/{len(self.stream.tasks)} {task.name}"
        started = time.monotonic()
        self._interrupted = True
        samples = training_samples(self.stream, index, self.method.kept_samples, self.config.seed)
        split = EncodedSplit(self.processor, samples, self._budget)
        keeper = self._checkpoints(index)
        self._ending.deferred = True
        with ProgressBar(f"train {name}", total_steps(len(samples), self.config), self._shown) as bar:
            loss = train_task(
                self.model,
                self.method,
                split.example,
                task=task.name,
                num_samples=len(samples),
                padding=self._padding,
                seed=task_seed(self.config.seed, index),
                bar=bar,
                forwards=self._work.forwards,
                keeper=keeper,
            )
        split.release()
        by_first(lambda: self._commit(index, round(time.monotonic() - started, 3), loss))
        self._interrupted = self._ending.deferred = False
        keeper.finish(task.name)

    def _commit(self, index: int, seconds: float, loss: float) -> None:
        """Write a training and, last, its bundle."""
        self.folder.write_identity(self._identity, self._settings)
        self.folder.write_training(index, seconds, loss)
        save(self.model, self.folder.bundle(index))

    def _checkpoints(self, index: int) -> TaskCheckpoints:
        """The checkpoints of a task. They belong to this configuration and to the state before the task."""
        of = {"identity": digest_of(without_later(self._identity)), "before": self.folder.state_before(index)}
        return TaskCheckpoints(
            self.folder.task(index) / "checkpoints",
            self._work.checkpoint_every,
            of,
            lambda: self.folder.write_identity(self._identity, self._settings),
            self._say,
            self._ending,
        )

    def evaluate(self, index: int) -> list[float]:
        """Test on the tasks up to `index`, commit predictions and accuracies, and return the accuracies."""
        tasks = self.stream.tasks[: index + 1]
        started = time.monotonic()
        accuracies: list[float] = []
        routing: dict[str, Routing] = {}
        published: dict[str, Published] = {}
        samples = sum(len(task.test) for task in tasks)
        state = by_first(lambda: manifest_digest(self.folder.bundle(index)))
        with ProgressBar(f"test after {index + 1}", samples, self._shown) as bar:
            for tested, task in enumerate(tasks):
                split = self._tests[task.name]
                file = self.folder.predictions(index, tested)
                result = run_test(self.model, self.processor, self.method, task, split, file, bar, state)
                accuracies.append(result.accuracy)
                if result.routing is not None:
                    routing[task.name] = result.routing
                if result.published is not None:
                    published[task.name] = result.published
        seconds = time.monotonic() - started
        record: dict[str, Any] = {"accuracies": accuracies, "seconds": round(seconds, 3), "routing": routing}
        if published:
            record["published"] = published
        by_first(lambda: self.folder.write_result(index, record))
        by_first(lambda: remove_parts(self.folder.predictions(index, 0).parent))
        self._say_row(accuracies, seconds)
        for name, each in published.items():
            self._say(published_line(name, each))
        return accuracies

    def _resume(self) -> tuple[int, int]:
        """Load the newest complete state, unless the model has it. Return finished and trained tasks."""
        finished, trained = by_first(self._choose_state)
        if trained and not self.cram.num_experts:
            load(self.model, self.folder.bundle(trained - 1))
            what = "trained" if trained > finished else "finished"
            self._say(
                f"resuming {self.folder.path}: task {trained} of {len(self.stream.tasks)} "
                f"({self.stream.tasks[trained - 1].name}) is {what}"
            )
        return finished, trained

    def _choose_state(self) -> tuple[int, int]:
        """Find the newest complete state and set aside what is damaged behind it."""
        self.folder.check_earlier()
        finished, trained = self.folder.count()
        while trained and (fault := self.folder.fault(trained - 1)):
            trained -= 1
            aside = self.folder.set_aside(self.folder.task(trained))
            self._say(
                f"task {trained + 1} is damaged and learnt again ({fault}); its files are now in {aside}"
            )
        finished = min(finished, trained)
        if trained < len(self.stream.tasks) and (self.folder.task(trained) / RESULT).exists():
            aside = self.folder.set_aside(self.folder.task(trained))
            self._say(f"task {trained + 1} has a result without its bundle and is learnt again; see {aside}")
        if finished and finished == trained and (fault := self.folder.result_fault(finished - 1)):
            finished -= 1
            aside = self.folder.set_aside(self.folder.task(finished) / RESULT)
            self._say(f"task {trained} is tested again ({fault}); the damaged result is now {aside}")
        for index in range(trained):
            self._checkpoints(index).remove()
        for index in range(finished):
            remove_parts(self.folder.predictions(index, 0).parent)
        return finished, trained

    def _report(self) -> Report:
        report = by_first(lambda: self.folder.report(self.method, self._settings))
        by_first(lambda: write_json(self.folder.path / "report.json", report))
        return report

    def _say(self, text: str) -> None:
        if self._shown:
            print(text, flush=True)

    def _say_row(self, accuracies: list[float], seconds: float) -> None:
        names = [task.name for task in self.stream.tasks[: len(accuracies)]]
        cells = "  ".join(f"{name} {accuracy:.1f}" for name, accuracy in zip(names, accuracies, strict=True))
        mean = sum(accuracies) / len(accuracies)
        self._say(f"after {names[-1]}: {cells}  mean {mean:.2f}  ({clock(seconds)})")


def _check_stream(stream: Stream) -> None:
    for task in stream.tasks:
        check_expert_name(task.name)
        for split, samples in (("train", task.train), ("test", task.test)):
            if not len(samples):
                raise ValueError(f"task {task.name!r} must have {split} samples, got none")
        ids = {sample.id for sample in task.test}
        if len(ids) != len(task.test):
            raise ValueError(f"test ids of task {task.name!r} must be unique, got repeated ones")
    check_tests(stream)
