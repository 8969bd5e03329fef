"""TRL's SFTTrainer on `messages` and `images`: one task per train(), as with transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cram import CramConfig, attach, load, save
from cram.learning.trainer import OneTask
from cram.loading import Sources
from cram.streams import Task, load_stream

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
]
trl = pytest.importorskip("trl", reason="trl is absent: pip install trl in an environment of its own")
datasets = pytest.importorskip("datasets", reason="datasets is absent; trl needs it")


class TaskSFTTrainer(OneTask, trl.SFTTrainer):  # type: ignore[misc]
    """SFTTrainer that learns one task."""


def rows(task: Task) -> Any:
    """The task as TRL's vision data: `images` beside `messages` whose content has a part per picture."""
    found = []
    for sample in task.train:
        asked = [{"type": "image", "text": None}, {"type": "text", "text": sample.instruction}]
        messages = [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": [{"type": "text", "text": sample.answer}]},
        ]
        found.append({"images": list(sample.images), "messages": messages})
    return datasets.Dataset.from_list(found)


def test_two_tasks_by_sft(tmp_path: Path) -> None:
    model, processor, encoder = Sources("builtin").load("cpu")
    config = CramConfig(buffer_rank=8, rank_min=2, rank_max=4, dropout=0.0, warmup_fraction=0.4)
    attach(model, config, encoder, processor)
    for task in load_stream("builtin", limit=8).tasks[:2]:
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path / task.name),
            max_steps=5,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            max_length=None,
            report_to=[],
            disable_tqdm=True,
        )
        made = TaskSFTTrainer(
            model=model, task=task.name, args=arguments, train_dataset=rows(task), processing_class=processor
        )
        made.train()
        steps = [entry for entry in made.state.log_history if "loss" in entry]
        assert len(steps) == 5 and all(entry["cross_entropy"] > 0 for entry in steps)
        assert steps[-1]["loss"] < steps[0]["loss"]
    assert list(model.cram.method.expert_groups()) == model.cram.expert_names
    assert len(model.cram.expert_names) == 2
    save(model, tmp_path / "bundle")
    again, _, encoder = Sources("builtin").load("cpu")
    assert load(again, tmp_path / "bundle", encoder).expert_names == model.cram.expert_names
