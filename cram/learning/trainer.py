"""Continual learning in transformers' Trainer: one `train()` learns one task.

    cram.attach(model, CramConfig(), encoder, processor)
    CramTrainer(model=model, task="colour", args=args, train_dataset=data, data_collator=collator).train()
    cram.save(model, "bundle")

Learning rate, batch size, epochs and checkpoints are those of `TrainingArguments`; the configuration has the
method's constants. `OneTask` does the work, and goes before any other trainer as well:

    class TaskSFTTrainer(OneTask, SFTTrainer): ...

A stage (CRAM: the buffer, then the expert) has parameters of its own. At its beginning they take the place of
the old ones in the optimiser, whose state starts anew; the learning-rate schedule goes on. The first step
has a rate above zero, because a buffer that trains for one step would stay zero otherwise.

Every process has the whole model, and the gradients of the expert are added up in one message. So the model
is not wrapped: DDP and FSDP bind parameters when they begin, and a stage brings new ones. Under ZeRO-2 of
DeepSpeed every stage gets an engine of its own; see `cram.learning.parallel.zero`.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import rotate_checkpoints

from cram.attach import attached
from cram.bundle.bundle import save
from cram.learning.checkpoint import (
    check_complete,
    mark_complete,
    newest_complete,
    read_checkpoint,
    write_checkpoint,
)
from cram.learning.parallel.processes import by_first, rank, sum_gradients, totals, world
from cram.learning.parallel.zero import ZeroStages, export_part, import_part
from cram.learning.step import TaskSteps, batch_route, gate_entropy
from cram.methods.base import MethodState
from cram.model.attached import AttachedModel

TASK, PART = "task", "optimizer-{:05d}"
NAMES = ("cross_entropy", "penalty", "gate_entropy")
# Arguments of the Trainer that must be off, and why.
REFUSED = {
    "load_best_model_at_end": "a stage has other parameters",
    "auto_find_batch_size": "a task cannot begin again",
    "label_smoothing_factor": "the Trainer does not shift the labels of a multimodal model",
}


class OneTask:
    """The part of a trainer that learns one task with an attached model; goes before the Trainer class."""

    model: Any
    args: Any
    state: Any
    accelerator: Any
    optimizer: Any
    lr_scheduler: Any
    current_gradient_accumulation_steps: int
    model_wrapped: Any
    is_deepspeed_enabled: bool
    _zero: ZeroStages | None

    def __init__(self, *arguments: Any, task: str, **options: Any) -> None:
        """Build the trainer.

        Args:
            *arguments: As of the Trainer class.
            task: Name of the task. Set the attribute before another `train()` to learn another task.
            **options: As of the Trainer class.

        Raises:
            ValueError: If the model is not attached, an optimiser is given, a process has several GPUs, or an
                argument asks for what a task in stages cannot do, or the method replays kept samples.
        """
        super().__init__(*arguments, **options)
        attached(self.model)
        if self.optimizer is not None or self.lr_scheduler is not None:
            raise ValueError(
                "optimizers must be left to the trainer, because a stage brings new parameters, got some"
            )
        for name, reason in REFUSED.items():
            if value := getattr(self.args, name):
                raise ValueError(f"{name} must be {type(value)()!r}, because {reason}, got {value!r}")
        if self.args.push_to_hub and self.args.hub_token is not None:
            raise ValueError(
                "hub_token must be None, because the Trainer uploads its arguments as they are: set HF_TOKEN "
                "instead, got one"
            )
        if kept := self.cram.method.kept_samples:
            raise ValueError(
                f"method must keep no samples, because the Trainer's data is the caller's, got "
                f"{self.cram.method.name!r}, which mixes {kept} older ones in: use cram.ContinualLearner, or "
                "method='sequential' with a data set that holds older rows"
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                "the GPUs of a process must be one, because DataParallel copies the model: launch a process "
                f"per GPU (torchrun), or show one (CUDA_VISIBLE_DEVICES), got {self.args.n_gpu}"
            )
        self.task = task
        self._steps: TaskSteps | None = None
        self._exported: MethodState | None = None
        self._meter = _Meter()
        self._checkpoint: Path | None = None
        self._began, self._rows = -1, 0.0

    @property
    def cram(self) -> AttachedModel:
        """The handle of the attached model."""
        return attached(self.model)

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        """Learn the task.

        Args:
            resume_from_checkpoint: A checkpoint of this task, or True for its newest complete one in the
                output folder. The model must have the experts of the earlier tasks.
            **options: As of `Trainer.train`.

        Raises:
            ValueError: If the checkpoint is damaged or incomplete, or of another task, length or model; or if
                the model is still in a training that was interrupted.
        """
        if self.cram.in_training or self.cram.hooks.solo_in_training:
            raise ValueError(
                "model must not be in training, got one whose training was interrupted: make it anew "
                "(cram.attach, cram.load), then train, or resume from a checkpoint"
            )
        of = {"task": self.task, "earlier experts": list(self.cram.expert_names)}
        self._checkpoint = _chosen(resume_from_checkpoint, Path(self.args.output_dir), of)
        self.optimizer = self.lr_scheduler = None
        found = str(self._checkpoint) if self._checkpoint else None
        result = super().train(resume_from_checkpoint=found, **options)  # type: ignore[misc]
        assert self._steps is not None
        if self._zero is not None:
            self._zero.release()
            self.model_wrapped = self.model
        self._steps.end()
        self._steps = None
        self.model.eval()
        return result

    def create_accelerator_and_postprocess(self) -> None:
        """Leave the model unwrapped; see the module."""
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        kind = str(self.accelerator.distributed_type.value)
        if kind in ("FSDP", "MEGATRON_LM"):
            raise NotImplementedError(
                f"CramTrainer must run without {kind}, which binds the parameters of one stage: launch plain "
                "processes (torchrun); cram.learning.parallel.sharding.shard divides a base that is too large"
            )
        self._zero = ZeroStages(self.accelerator, self.model) if kind == "DEEPSPEED" else None
        # Else the Trainer would prepare, save and load one engine for the whole training.
        self.is_deepspeed_enabled = False
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Begin the task, or take it up from the checkpoint, with an optimiser for its present stage."""
        self._steps = steps = TaskSteps(self.cram.method, self.task)
        self._older = list(self.cram.expert_names)
        if self._checkpoint is None:
            steps.begin(self.state.max_steps)
            steps.stage(0)
            self._began = 0
        else:
            tensors, values = read_checkpoint(self._checkpoint / TASK, self._of())
            self.cram.method.import_training(self.task, self.state.max_steps, tensors, values)
            steps.resume()
            self._began = -1
        self.optimizer = self._new_optimizer({"weight_decay": self.args.weight_decay})
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The Trainer's schedule, whose warm-up begins above zero."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]
        warm = self.args.get_warmup_steps(num_training_steps)
        if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR) and warm:
            before = scheduler.lr_lambdas[0]
            scheduler.lr_lambdas = [lambda step: before(max(step, min(step + 1, warm)))]
            scheduler._last_lr = [scheduler.base_lrs[0] * scheduler.lr_lambdas[0](0)]
            scheduler.optimizer.param_groups[0]["lr"] = scheduler._last_lr[0]
        return scheduler

    def get_batch_samples(self, *arguments: Any, **options: Any) -> tuple[list[Any], Any]:
        """The batches of a step; counts its samples in all processes."""
        batches, items = super().get_batch_samples(*arguments, **options)  # type: ignore[misc]
        (self._rows,) = totals(sum(_rows(batch) for batch in batches))
        return batches, items

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One forward and backward; at the step's last one, the sum over the processes."""
        assert self._steps is not None
        if self._began != self.state.global_step:
            self._began = self.state.global_step
            if (fresh := self._steps.stage(self._began)) is not None:
                self._renew_optimizer(fresh)
            for parameter in self._steps.parameters:
                parameter.grad = None
        acting = model if self._zero is None else self.model_wrapped
        loss: Tensor = super().training_step(acting, inputs, num_items_in_batch)  # type: ignore[misc]
        if self.accelerator.sync_gradients:
            if self._zero is None:
                sum_gradients(self._steps.parameters, 1 / world())
            else:
                self._zero.copy_back()
            self._steps.finish()
            self._meter.steps += 1
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The Trainer's loss and, in training, the method's own loss of this forward.

        An evaluation within the training tells the task to a method that must be told.
        """
        if self._steps is None or not self.model.training:
            with nullcontext() if self._steps is None else batch_route(self.cram.method, self.task):
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        rows, tokens = _rows(inputs), inputs["input_ids"].numel()
        with self._steps.forward():
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)  # type: ignore[misc]
        divided = 1 if self._is_part(num_items_in_batch) else self.current_gradient_accumulation_steps
        entropy = gate_entropy(self.cram.state.route)
        extra = self._steps.added(rows / self._rows * world() * divided)
        self._meter.add(loss.detach() / divided, extra, divided, entropy, tokens)
        whole = loss if extra is None else loss + extra
        return (whole, outputs) if return_outputs else whole

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the training's own numbers beside the loss."""
        if "loss" in logs and self._steps is not None:
            logs |= self._meter.read() | self.cram.method.facts()
        super().log(logs, start_time)  # type: ignore[misc]

    def _is_part(self, num_items_in_batch: Any) -> bool:
        """Whether a loss is a part of a sum over the step, which the Trainer does not divide any further."""
        told = getattr(self, "loss_is_scaled_for_ga", None)
        if told is not None:
            return bool(told)
        counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None  # type: ignore[attr-defined]
        return bool(counted or self.compute_loss_func is not None)  # type: ignore[attr-defined]

    def _new_optimizer(self, group: dict[str, Any]) -> torch.optim.Optimizer:
        """An optimiser of the stage's parameters, with the settings of a group."""
        assert self._steps is not None
        parameters = self._steps.parameters
        if self._zero is not None:
            parameters = self._zero.hold(parameters)
        kind, options = type(self).get_optimizer_cls_and_kwargs(self.args, self.model)  # type: ignore[attr-defined]
        made: torch.optim.Optimizer = kind([{**group, "params": parameters}], **options)
        return made

    def _renew_optimizer(self, parameters: list[nn.Parameter]) -> None:
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        (group,) = optimizer.param_groups
        if self._zero is None:
            group["params"] = parameters
            optimizer.state.clear()
            return
        self._zero.release()
        self.model_wrapped, self.optimizer = self.accelerator.prepare(self.model, self._new_optimizer(group))
        self.lr_scheduler.optimizer = self.optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip all that is trained. CRAM's centroid is no parameter of the model."""
        assert self._steps is not None
        return self.accelerator.clip_grad_norm_(self._steps.parameters, self.args.max_grad_norm)

    def _of(self) -> dict[str, Any]:
        """What a checkpoint belongs to."""
        return {
            "task": self.task,
            "number of steps": self.state.max_steps,
            "number of ZeRO processes": 0 if self._zero is None else world(),
            "earlier experts": self._older,
            "config": self.cram.config.to_dict(),
        }

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer. Every process must call it: within a task they add up what each has gathered."""
        self._exported = None if self._steps is None else self.cram.method.export_training()
        try:
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        finally:
            self._exported = None

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the task in training, or else the bundle of all experts, in place of the base model.

        Beside the checkpoints in `output_dir` the bundle has a folder of its own, `output_dir/bundle`.
        """
        folder = Path(output_dir or self.args.output_dir)
        if not self.args.should_save:
            return
        if self._steps is None:
            save(self.model, folder / "bundle" if folder == Path(self.args.output_dir) else folder)
        else:
            tensors, values = self._exported or self.cram.method.export_training()
            write_checkpoint(folder / TASK, tensors, values, self._of())

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As the Trainer; under ZeRO-2 every process writes its part of the optimiser's state."""
        if self._zero is None:
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        write_checkpoint(Path(output_dir) / PART.format(rank()), *export_part(self.optimizer), self._of())
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As the Trainer; under ZeRO-2 every process reads its part of the optimiser's state."""
        if self._zero is None or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        import_part(self.optimizer, *read_checkpoint(Path(checkpoint) / PART.format(rank()), self._of()))
        self.is_deepspeed_enabled = True  # Then the Trainer reads the schedule alone.
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        self.is_deepspeed_enabled = False

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: the optimiser needs the task first; see `create_optimizer`."""

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: the checkpoint is not complete yet; see `_save_checkpoint`."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The Trainer's checkpoint, marked complete behind its last file; only then is it pushed, and only
        then do older ones go."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            self.args.save_total_limit = limit
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        by_first(lambda: None)  # Every process has written its random state.
        by_first(lambda: mark_complete(folder))
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(folder))  # type: ignore[misc]
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(self.args.output_dir, limit, best_model_checkpoint=best, use_mtime=True)


class CramTrainer(OneTask, Trainer):
    """transformers' Trainer that learns one task; see `OneTask`."""


class _Meter:
    """What a training logs beside the loss: means over the steps since the last time."""

    def __init__(self) -> None:
        self.steps = 0
        self._since = time.monotonic()
        self._sums: dict[str, Any] = {}
        self._forwards, self._tokens = 0, 0

    def add(
        self, loss: Tensor, extra: Tensor | None, divided: int, entropy: Tensor | None, tokens: int
    ) -> None:
        """Count a forward: its part of the step's cross-entropy, the method's part, the gates' entropy."""
        penalty = None if extra is None else extra.detach() / divided
        for name, value in zip(NAMES, (loss, penalty, entropy), strict=True):
            if value is not None:
                self._sums[name] = self._sums.get(name, 0.0) + value
        self._forwards += 1
        self._tokens += tokens

    def read(self) -> dict[str, float]:
        """Return the means over steps (gate entropy: over forwards) and processes, and begin anew."""
        now = time.monotonic()
        counts = (max(1, self.steps), max(1, self.steps), max(1, self._forwards))
        own = [float(self._sums.get(name, 0.0)) / count for name, count in zip(NAMES, counts, strict=True)]
        *sums, tokens = totals(*own, float(self._tokens))
        found = {name: value / world() for name, value in zip(NAMES, sums, strict=True)}
        found["tokens_per_second"] = tokens / max(1e-9, now - self._since)
        self.__init__()  # type: ignore[misc]
        return found


def _rows(batch: Any) -> int:
    """The samples of a batch."""
    return len(batch["input_ids"])


def _chosen(wanted: str | bool | None, output: Path, of: dict[str, Any]) -> Path | None:
    """The checkpoint to resume from: one that is complete and, where none is named, of this task."""
    if not wanted:
        return None
    if wanted is True:
        return newest_complete(output, TASK, of)
    check_complete(Path(str(wanted)))
    return Path(str(wanted))
