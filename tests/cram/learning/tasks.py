"""Tasks for a Trainer: a fresh tiny model, encoded samples, and one task after another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from cram import CramConfig, CramTrainer
from cram.learning.batches import Example, encode_sample, training_batch
from cram.streams import Task
from tests.cram import factories, runs


def fresh(config: CramConfig) -> Any:
    """A tiny attached LLaVA."""
    model, encoder = factories.fresh()
    from cram import attach

    attach(model, config, encoder, factories.llava_processor())
    return model


def seeded(model: Any, seed: int = 0) -> None:
    """Let a model's method draw the same initial values, whoever trains it."""
    begin = model.cram.method.begin_task

    def begin_seeded(task: str, total_steps: int) -> None:
        torch.manual_seed(seed)
        begin(task, total_steps)

    model.cram.method.begin_task = begin_seeded


def examples(task: Task, count: int = 8) -> list[Example]:
    """Encoded training samples; a short task begins again."""
    processor = factories.llava_processor()
    return [encode_sample(processor, task.train[i % len(task.train)]) for i in range(count)]


def collate(rows: list[Example]) -> dict[str, torch.Tensor]:
    """What a user's collator makes: inputs and labels."""
    inputs, labels = training_batch(rows, 0)
    return {**inputs, "labels": labels}


def trainer(model: Any, task: Task, out: Path, kind: Any = CramTrainer, **options: Any) -> CramTrainer:
    """A trainer of five steps on a task, with the learner's hyper-parameters; `options` change arguments."""
    settings = {
        "output_dir": str(out),
        "max_steps": 5,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    arguments = TrainingArguments(**{**settings, **options})
    made = kind(
        model=model, task=task.name, args=arguments, train_dataset=examples(task), data_collator=collate
    )
    for name in ("PrinterCallback", "ProgressCallback"):
        made.callback_handler.callbacks = [
            each for each in made.callback_handler.callbacks if type(each).__name__ != name
        ]
    return made


def logged(made: CramTrainer, name: str) -> list[float]:
    """Every value that was logged under a name."""
    return [entry[name] for entry in made.state.log_history if name in entry]


def experts(model: Any) -> dict[str, torch.Tensor]:
    """The factors of all experts and the centroids."""
    cram = model.cram
    found = {
        f"{index}.{path}.{side}": pair[i]
        for index in range(cram.num_experts)
        for path, pair in cram.expert_weights(index).items()
        for i, side in enumerate("ab")
    }
    return {**found, "centroids": cram.method.router.centroids().detach()}


def same_group(**changes: Any) -> tuple[Task, Task]:
    """Two tasks with one question, so that the second one has a penalty."""
    first, second = (
        runs.task("one", "Which colour", ("up", "no"), 0),
        runs.task("two", "Which colour", ("no", "up"), 50),
    )
    return first, second
