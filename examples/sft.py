"""Learn two tasks with TRL's SFTTrainer, from rows of `messages` and `images`.

    pip install trl
    python examples/sft.py [FOLDER] [STEPS]

Each `train()` learns one task, as with `cram.CramTrainer`. The experts are saved as FOLDER/bundle.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import cram
from cram.learning.trainer import OneTask
from cram.loading import Sources
from cram.streams import Task, load_stream


class TaskSFTTrainer(OneTask, SFTTrainer):
    """SFTTrainer that learns one task."""


def rows(task: Task) -> Any:
    """The training samples as TRL reads them: `images`, and `messages` with a part for each picture."""
    found = []
    for sample in task.train:
        asked = [{"type": "image", "text": None}, {"type": "text", "text": sample.instruction}]
        messages = [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": [{"type": "text", "text": sample.answer}]},
        ]
        found.append({"images": list(sample.images), "messages": messages})
    return Dataset.from_list(found)


def main(folder: Path, steps: int) -> Any:
    """Learn two tasks, save the bundle, and answer a test question of each; returns the last trainer."""
    model, processor, encoder = Sources("builtin").load()
    handle = cram.attach(model, cram.CramConfig(tau_orth=0.9), encoder, processor)
    tasks = load_stream("builtin", limit=8 * steps).tasks[:2]
    for task in tasks:
        arguments = SFTConfig(
            output_dir=str(folder / task.name),
            max_steps=steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=3e-3,
            max_length=None,  # A prompt must not be cut: its pictures stand for many tokens.
            logging_steps=1,
            save_strategy="no",
            bf16=False,
            report_to=[],
        )
        trainer = TaskSFTTrainer(
            model=model, task=task.name, args=arguments, train_dataset=rows(task), processing_class=processor
        )
        trainer.train()
    cram.save(model, folder / "bundle")
    for task in tasks:
        sample = task.test[0]
        answer = handle.answer(sample.images, sample.instruction, max_new_tokens=task.max_new_tokens)
        print(f"{task.name}: {answer} ({answer.routing()}), expected {sample.answer}")
    return trainer


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(Path(arguments[0] if arguments else "runs/sft"), int(arguments[1]) if len(arguments) > 1 else 40)
