"""Learn two tasks with transformers' Trainer, one `train()` per task.

    python examples/trainer.py [FOLDER] [STEPS]

The tasks are the first two of the built-in stream, on the base that comes with the package. The experts are
saved as FOLDER/bundle. Take a model such as "llava-hf/llava-1.5-7b-hf" in the place of "builtin", rows of
your own in the place of `task.train`, and the paper's learning rate 2e-4 for a model of that size.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

import cram
from cram.learning.batches import encode_sample, pad_id, training_batch
from cram.loading import Sources
from cram.streams import Sample, load_stream


def main(folder: Path, steps: int) -> None:
    """Learn two tasks, save the bundle, and answer a test question of each."""
    model, processor, encoder = Sources("builtin").load()
    handle = cram.attach(model, cram.CramConfig(), encoder, processor)

    def collate(samples: list[Sample]) -> dict[str, Any]:
        """Model inputs, and labels that are -100 outside of the answers."""
        encoded = [encode_sample(processor, sample) for sample in samples]
        inputs, labels = training_batch(encoded, pad_id(processor.tokenizer))
        return {**inputs, "labels": labels}

    tasks = load_stream("builtin", limit=8 * steps).tasks[:2]
    for task in tasks:
        arguments = TrainingArguments(
            output_dir=str(folder / task.name),
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            logging_steps=max(1, steps // 4),
            save_strategy="no",
            remove_unused_columns=False,  # The rows are samples; `collate` makes the columns.
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to=[],
        )
        rows = list(task.train)
        trainer = cram.CramTrainer(
            model=model, task=task.name, args=arguments, train_dataset=rows, data_collator=collate
        )
        trainer.train()
    cram.save(model, folder / "bundle")
    for task in tasks:
        sample = task.test[0]
        answer = handle.answer(sample.images, sample.instruction, max_new_tokens=task.max_new_tokens)
        print(f"{task.name}: {answer} ({answer.routing()}), expected {sample.answer}")


if __name__ == "__main__":
    given = sys.argv[1:]
    main(Path(given[0] if given else "runs/trainer"), int(given[1]) if len(given) > 1 else 40)
