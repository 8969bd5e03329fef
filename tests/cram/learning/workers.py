"""What each of several gloo processes runs in the tests; spawned processes find it by its name."""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cram.compare.base_row import measure_base
from cram.learning.answers.evaluate import evaluate_run
from cram.learning.learner import ContinualLearner, Work
from cram.learning.training import TaskLoop
from tests.cram import factories, runs
from tests.cram.learning.tasks import experts, fresh, logged, same_group, seeded, trainer


def together(worker: Any, folder: Path, *arguments: Any, processes: int = 2) -> None:
    """Run a worker in several processes, each as `worker(rank, folder, *arguments)` in one group."""
    folder.mkdir(parents=True, exist_ok=True)
    mp.spawn(_join, (processes, str(folder), worker, arguments), nprocs=processes)


def _join(rank: int, processes: int, folder: str, worker: Any, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in place.items()})
    store = f"file://{folder}/store"
    patience = timedelta(minutes=5)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=processes, timeout=patience)
    try:
        worker(rank, Path(folder), *arguments)
    finally:
        dist.destroy_process_group()


def learn(rank: int, folder: Path, method: str, options: dict[str, Any]) -> None:
    """A run of two tasks."""
    runs.learner(folder / "run", method, **options).run()


def learn_three(rank: int, folder: Path, method: str, options: dict[str, Any]) -> None:
    """A run of all three tasks, of which the last one has samples with and without pictures."""
    runs.learner(folder / "run", method, runs.stream(), **options).run()


class Cut(BaseException):
    """Stands for a process that dies behind a step."""


def dying_step(loop: TaskLoop, *arguments: Any) -> float:
    """A step that dies behind the second one of the second task."""
    if loop.steps.task == "letter" and loop.done == 2:
        raise Cut
    return step(loop, *arguments)


step = TaskLoop.step


def learn_each(rank: int, folder: Path, kinds: dict[str, tuple[str, dict[str, Any]]]) -> None:
    """A run of two tasks of each kind, of a method with options; then one that dies in a task and goes on."""
    for name, (method, options) in kinds.items():
        learn(rank, folder / name, method, options)
        for act in (dying_step, step):
            made = runs.learner(folder / f"{name}-cut/run", method, **options)
            made._work = Work(checkpoint_every=1)
            with patch.object(TaskLoop, "step", act), suppress(Cut):
                made.run()


def learn_and_test(rank: int, folder: Path, options: dict[str, Any]) -> None:
    """A run, then an evaluation of it."""
    learn(rank, folder, "cram", options)
    model, encoder = factories.fresh()
    evaluate_run(folder / "run", runs.two_tasks(), model, factories.llava_processor(), encoder, False)
    measure_base(runs.learner(folder / "run", **options), folder / "base")


def train_with_trainer(rank: int, folder: Path, options: dict[str, Any]) -> None:
    """Two tasks by CramTrainer, half of each step's samples in each process."""
    model = fresh(runs.config(dropout=0.0))
    seeded(model, rank)  # The first process's values are everybody's.
    found: dict[str, list[float]] = {}
    for task in same_group():
        made = trainer(model, task, folder / task.name, ddp_backend="gloo", **options)
        made.train()
        for name in ("loss", "cross_entropy", "penalty"):
            found.setdefault(name, []).extend(logged(made, name))
    if rank == 0:
        torch.save({**found, "experts": experts(model)}, folder / "found")


def resume_with_trainer(
    rank: int, folder: Path, kinds: dict[str, dict[str, Any]], options: dict[str, Any]
) -> None:
    """A task by CramTrainer with each method, and again from the checkpoint of its first step."""
    found = {}
    for method, changes in kinds.items():
        for start in (None, str(folder / method / "checkpoint-1")):
            model = fresh(runs.config(method=method, dropout=0.0, **changes))
            seeded(model)
            made = trainer(
                model, same_group()[0], folder / method, save_strategy="steps", save_steps=1, **options
            )
            made.train(resume_from_checkpoint=start)
            name = method if start is None else f"{method}, resumed"
            found[name] = [
                module.solo_factors() if module.solo is not None else module.factors([0])[0]
                for module in model.cram.modules.values()
            ]
    if rank == 0:
        torch.save(found, folder / "found")


def learn_sharded(rank: int, folder: Path, options: dict[str, Any]) -> None:
    """A run of two tasks on a base that is divided between the processes; the second task is resumed."""
    made = sharded_learner(folder, options)
    measure_base(made, folder / "base")
    made.learn(0)
    made.evaluate(0)
    sharded_learner(folder, options).run()


def sharded_learner(folder: Path, options: dict[str, Any]) -> ContinualLearner:
    """A learner whose base is divided."""
    model, encoder = factories.fresh()
    return ContinualLearner(
        model,
        factories.llava_processor(),
        runs.two_tasks(),
        runs.config(**options),
        out=folder / "run",
        encoder=encoder,
        progress=False,
        work=Work(sharded=True),
    )
