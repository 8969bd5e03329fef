"""A step of CramTrainer against a step of transformers' Trainer with a PEFT LoRA of equal rank.

    python -m benchmarks trainer                       the shipped base on the CPU
    torchrun --nproc-per-node 2 -m benchmarks trainer  two processes; PEFT's model under DDP

Both train the same samples with the same arguments. The first task's expert acts alone, as the LoRA does.
The second task's expert acts beside a frozen one, under the penalty, and both are routed: that is CRAM's
work, for which the LoRA has no counterpart. Steps of the buffer are left out. The trainers take turns, a
whole `train()` each; a figure is the median over all steps but the first two of each turn. With --out, the
lines also go to trainer.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

RANK, STEPS, WARM, BATCH = 9, 14, 2, 8
GOAL = 1.15


def main(argv: Sequence[str]) -> int:
    """Run the program; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks trainer", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each trainer (default: 3)")
    parser.add_argument("--toy", action="store_true", help="few steps: whether it runs, not how fast")
    parser.add_argument("--out", metavar="DIR", help="folder of trainer.json")
    arguments = parser.parse_args(argv)
    from cram.learning.parallel.processes import is_first, joined

    with joined("cpu"):
        rows = measure(1 if arguments.toy else arguments.rounds, 6 if arguments.toy else STEPS)
        if is_first():
            for row in rows:
                print(json.dumps(row))
            if arguments.out:
                Path(arguments.out).mkdir(parents=True, exist_ok=True)
                (Path(arguments.out) / "trainer.json").write_text(json.dumps({"rows": rows}, indent=2))
    return 0


def measure(rounds: int, steps: int) -> list[dict[str, Any]]:
    """Median step of each candidate in milliseconds, and its ratio to PEFT's."""
    from cram.learning.parallel.processes import world

    times: dict[str, list[float]] = {"peft": [], "cram, first task": [], "cram, second task": []}
    with tempfile.TemporaryDirectory() as folder:
        data = samples()
        for _ in range(rounds):
            times["peft"] += peft_steps(data, steps, folder)
            first, second = cram_steps(data, steps, folder)
            times["cram, first task"] += first
            times["cram, second task"] += second
    medians = {name: 1e3 * statistics.median(each) for name, each in times.items()}
    return [
        {
            "candidate": name,
            "processes": world(),
            "rank": RANK,
            "batch": BATCH,
            "median_ms": round(value, 3),
            "ratio": round(value / medians["peft"], 3),
            "goal": GOAL if name == "cram, first task" else None,
        }
        for name, value in medians.items()
    ]


def samples() -> list[Any]:
    """Encoded samples of the built-in stream's first task."""
    from cram.learning.batches import encode_sample
    from cram.loading import Sources
    from cram.streams import load_stream

    _, processor, _ = Sources("builtin").load("cpu")
    task = load_stream("builtin", limit=64).tasks[0]
    return [encode_sample(processor, sample) for sample in task.train]


def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
    """Inputs and labels of one batch."""
    from cram.learning.batches import training_batch

    inputs, labels = training_batch(rows, 0)
    return {**inputs, "labels": labels}


def options(data: list[Any], steps: int, folder: str) -> dict[str, Any]:
    """What both trainers get, with a clock."""
    from transformers import TrainingArguments

    from cram.learning.parallel.processes import world

    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=BATCH // world(),
        learning_rate=2e-4,
        logging_strategy="no",
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    return {"args": arguments, "train_dataset": data, "data_collator": collate, "callbacks": [clock()]}


def clock() -> Any:
    """A callback with the seconds of every step."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Seconds from the end of one step to the end of the next."""

        def __init__(self) -> None:
            self.seconds: list[float] = []
            self._last = 0.0

        def on_train_begin(self, *arguments: Any, **options: Any) -> None:
            self._last = time.perf_counter()

        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            now = time.perf_counter()
            self.seconds.append(now - self._last)
            self._last = now

    return Clock()


def peft_steps(data: list[Any], steps: int, folder: str) -> list[float]:
    """Seconds of the steps of a plain Trainer on a PEFT LoRA."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer

    from cram.loading import Sources

    model, _, _ = Sources("builtin").load("cpu")
    projections = r".*language_model\.layers\.\d+\.self_attn\.[qkvo]_proj"
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.05, target_modules=projections)
    given = options(data, steps, folder)
    Trainer(model=get_peft_model(model, config), **given).train()
    return given["callbacks"][0].seconds[WARM:]


def cram_steps(data: list[Any], steps: int, folder: str) -> tuple[list[float], list[float]]:
    """Seconds of the expert's steps of two tasks in one group."""
    from cram import CramConfig, CramTrainer, attach
    from cram.loading import Sources

    model, processor, encoder = Sources("builtin").load("cpu")
    attach(model, CramConfig(rank_min=RANK, rank_max=RANK, tau_orth=0.0), encoder, processor)
    found = []
    for task in ("first", "second"):
        given = options(data, steps, folder)
        CramTrainer(model=model, task=task, **given).train()
        found.append(given["callbacks"][0].seconds[WARM:])
    return found[0], found[1]
