"""A tuner for ms-swift: one `swift sft` learns one task.

    swift sft --external_plugins examples/ms_swift.py --tuner_type cram --model llava-hf/llava-1.5-7b-hf \
        --model_kwargs '{"cram_task": "colour"}' --dataset colour.jsonl --output_dir out/colour
    swift sft --external_plugins examples/ms_swift.py --tuner_type cram --model llava-hf/llava-1.5-7b-hf \
        --model_kwargs '{"cram_task": "count"}' --dataset count.jsonl --output_dir out/count \
        --adapters out/colour/bundle
    swift infer --adapters out/count/bundle

`--model_kwargs` also takes `cram_clip` (where CLIP is) and `cram_config` (JSON text, values of `CramConfig`).
Experts and routing are saved as OUTPUT_DIR/bundle. `--resume_from_checkpoint` goes on within a task.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from swift.trainers import Seq2SeqTrainer, TrainerFactory
from swift.tuner_plugin import Tuner, tuners_map

import cram
from cram.learning.trainer import TASK, OneTask
from cram.loading import PAPER_CLIP, load_encoder

EARLIER = "earlier.json"  # In a checkpoint: the bundle whose experts the task began with, or null.


class TaskTrainer(OneTask, Seq2SeqTrainer):
    """ms-swift's trainer that learns one task."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Take the task's name from `--model_kwargs`, which ms-swift puts into the environment.

        Raises:
            ValueError: If there is no name.
        """
        if "CRAM_TASK" not in os.environ:
            raise ValueError('--model_kwargs must name the task, such as \'{"cram_task": "colour"}\'')
        super().__init__(*arguments, task=os.environ["CRAM_TASK"], **options)

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """By the methods of this trainer; ms-swift's own callback goes past them."""
        self.create_optimizer()
        self.create_scheduler(num_training_steps, self.optimizer)

    def train(self, *arguments: Any, **options: Any) -> Any:
        """Learn the task and save the bundle."""
        result = super().train(*arguments, **options)
        self.save_model(str(Path(self.args.output_dir) / "bundle"))
        return result

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """ms-swift's files, with the arguments that `swift infer` reads; `_save_model` writes the rest."""
        Seq2SeqTrainer._save(self, output_dir, state_dict)

    def _save_model(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The task in training, or else what the tuner saves."""
        if self._steps is None:
            tuners_map["cram"].save_pretrained(self.model, output_dir)
            return
        OneTask._save(self, output_dir)
        (Path(output_dir) / EARLIER).write_text(json.dumps(getattr(self.model, "cram_earlier", None)))


class CramTuner(Tuner):
    """Experts that are routed by question and image."""

    @staticmethod
    def prepare_model(args: Any, model: Any) -> Any:
        """Attach to the base model, before the first task."""
        TrainerFactory.TRAINER_MAPPING["causal_lm"] = f"{__name__}.{TaskTrainer.__name__}"
        config = cram.CramConfig(**json.loads(os.environ.get("CRAM_CONFIG", "{}")))
        cram.attach(model, config, load_encoder(os.environ.get("CRAM_CLIP", PAPER_CLIP), model))
        return model

    @staticmethod
    def save_pretrained(model: Any, save_directory: str, *_: Any, **__: Any) -> None:
        """Write the bundle of all experts."""
        cram.save(model, save_directory)

    @staticmethod
    def from_pretrained(model: Any, model_id: str, is_trainable: bool = False, **_: Any) -> Any:
        """Load a bundle, or the experts that the task of a checkpoint began with."""
        source: str | None = model_id
        if (Path(model_id) / TASK).is_dir():
            source = json.loads((Path(model_id) / EARLIER).read_text())
        if is_trainable:
            CramTuner.prepare_model(None, model)
        if source is not None:
            cram.load(model, source)
        model.cram_earlier = source
        return model


tuners_map["cram"] = CramTuner
