"""The training loop of one task: AdamW, linear warm-up and cosine over all steps, cross-entropy on answers.

A step's samples may be divided into several forwards, and between several processes; see
`cram.learning.step`. Everything that the rest of a task depends on can be exported after any step.

Logits are computed only at positions where a row of the batch has an answer token. A method may begin a new
stage; in CRAM the expert follows the buffer. A new stage gets a fresh optimiser and stays on the
learning-rate schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cram.console import ProgressBar
from cram.learning.batches import IGNORED, Example, to_model, training_batch
from cram.learning.parallel.processes import gathered_rows, own_share, rank, sum_gradients, totals, world
from cram.learning.schedule import batch_order, learning_rate, total_steps
from cram.learning.step import TaskSteps
from cram.methods import Method
from cram.methods.base import MethodState

FP16_INITIAL_LOSS_SCALE = 1024.0


class TaskLoop:
    """The loop of one task, at any step of it.

    Attributes:
        steps: The task in training.
        done: Finished steps.
        losses: Cross-entropy of every finished step.
    """

    def __init__(self, model: Any, method: Method, task: str, total: int) -> None:
        """Nothing begins.

        Args:
            model: The attached model.
            method: The method, before `begin_task`.
            task: Name of the task.
            total: Steps of the task.
        """
        self.steps = TaskSteps(method, task)
        self.done, self.losses = 0, list[float]()
        self._model, self._method, self._total = model, method, total
        self._config = method.config
        self._optimizer: torch.optim.Optimizer | None = None
        self._scaler = torch.amp.GradScaler(
            model.device.type, init_scale=FP16_INITIAL_LOSS_SCALE, enabled=model.dtype == torch.float16
        )

    def begin(self, seed: int) -> None:
        """Begin the task. Every process draws the same initial values, and dropout masks of its own."""
        torch.manual_seed(seed)
        self.steps.begin(self._total)
        if rank():
            torch.manual_seed(seed + rank())

    def step(self, batches: Sequence[Batch], samples: int) -> float:
        """Run one step.

        Args:
            batches: This process's part of the step, a batch per forward.
            samples: Samples of the step in all processes.

        Returns:
            The mean cross-entropy over the answer tokens of the whole step.

        Raises:
            ValueError: If the loss is not finite.
        """
        self._begin_stage()
        counts = [batch.tokens if batch.samples else 0 for batch in batches]
        (tokens,) = totals(sum(counts))
        value = 0.0
        for batch, count in zip(batches, counts, strict=True):
            with self.steps.forward(counted=batch.samples > 0):
                loss = answer_loss(
                    self._model, to_model(batch.inputs, self._model), batch.labels.to(self._model.device)
                )
            loss = loss if count == tokens else loss * (count / tokens)
            value += float(loss.detach())
            extra = self.steps.added(batch.samples / samples)
            self._scaler.scale(loss if extra is None else loss + extra).backward()
        self._update()
        self.steps.finish()
        (value,) = totals(value)
        if not math.isfinite(value):
            raise ValueError(f"loss of {self.steps.task} must be finite, got {value} at step {self.done}")
        self.losses.append(value)
        self.done += 1
        return value

    def end(self) -> float:
        """End the task and return the mean cross-entropy of the last tenth of the steps."""
        self.steps.end()
        last = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(last) / len(last)

    def export(self) -> MethodState:
        """Return everything that the rest of the task depends on, beside the experts of earlier tasks.

        All processes must call it. Each has random generators of its own, and they all are in the state.
        """
        assert self._optimizer is not None
        tensors, values = self._method.export_training()
        optimizer = self._optimizer.state_dict()["state"]
        for index, state in optimizer.items():
            tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items()}
        tensors |= {name: gathered_rows(state[None]) for name, state in random_state().items()}
        loop = {"done": self.done, "losses": self.losses, "scaler": self._scaler.state_dict()}
        return MethodState(tensors, {"method": values, "loop": loop})

    def resume(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take up an exported state in a fresh loop.

        Raises:
            ValueError: If a part is missing or does not fit the model.
        """
        self._method.import_training(self.steps.task, self._total, tensors, values["method"])
        self.steps.resume()
        self._optimizer = self._new_optimizer()
        states: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                states.setdefault(int(index), {})[key] = tensor
        whole = self._optimizer.state_dict()
        self._optimizer.load_state_dict({"state": states, "param_groups": whole["param_groups"]})
        loop = values["loop"]
        self.done, self.losses = loop["done"], list(loop["losses"])
        self._scaler.load_state_dict(loop["scaler"])
        rows = {name: tensors[name] for name in random_state() if name in tensors}
        set_random_state({name: states[rank() % len(states)] for name, states in rows.items()})

    def _begin_stage(self) -> None:
        if self.steps.stage(self.done) is not None:
            self._optimizer = self._new_optimizer()
        assert self._optimizer is not None
        self._optimizer.param_groups[0]["lr"] = learning_rate(self.done, self._total, self._config)

    def _new_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.steps.parameters, weight_decay=self._config.weight_decay)

    def _update(self) -> None:
        optimizer, parameters, clip = self._optimizer, self.steps.parameters, self._config.grad_clip
        assert optimizer is not None
        sum_gradients(parameters)
        self._scaler.unscale_(optimizer)
        if clip > 0:
            nn.utils.clip_grad_norm_(parameters, clip)
        self._scaler.step(optimizer)
        self._scaler.update()
        optimizer.zero_grad(set_to_none=True)


class Batch(NamedTuple):
    """Samples of one forward.

    Attributes:
        inputs: Model inputs.
        labels: [B, T].
        samples: B, or 0 if the samples stand in for an empty share.
        tokens: Number of answer tokens.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    samples: int
    tokens: int


def own_batches(
    examples: Callable[[int], Example], indices: list[int], padding: int, forwards: int
) -> list[Batch]:
    """Return this process's part of a step, divided into at most `forwards` batches.

    All processes must run the same number of forwards, because some forwards exchange messages. So an empty
    part runs one sample that counts for nothing.
    """
    mine, count = own_share(indices), min(forwards, math.ceil(len(indices) / world()))
    size = math.ceil(len(mine) / count)
    batches = []
    for number in range(count):
        part = mine[number * size : (number + 1) * size]
        inputs, labels = training_batch([examples(index) for index in part or indices[:1]], padding)
        tokens = int((labels[:, 1:] != IGNORED).sum())
        batches.append(Batch(inputs, labels, len(part), tokens))
    return batches


def train_task(
    model: Any,
    method: Method,
    examples: Callable[[int], Example],
    *,
    task: str,
    num_samples: int,
    padding: int,
    seed: int,
    bar: ProgressBar,
    forwards: int = 1,
    keeper: Keeper | None = None,
) -> float:
    """Train a method on one task.

    Args:
        model: The attached model.
        method: The method, before `begin_task`.
        examples: Sample index -> encoded training sample.
        task: Name of the task.
        num_samples: Number of training samples.
        padding: Padding id.
        seed: Decides initial weights, data order and dropout.
        bar: Progress bar, one tick per step.
        forwards: Forwards per step and process. More of them need less memory; the step stays the same.
        keeper: Keeps checkpoints within the task, or None.

    Returns:
        Mean cross-entropy of the last tenth of the steps.

    Raises:
        ValueError: If the loss is not finite.
    """
    config, total = method.config, total_steps(num_samples, method.config)
    loop = TaskLoop(model, method, task, total)
    with training_mode(model, config.gradient_checkpointing):
        if keeper is None or not keeper.resume(loop):
            loop.begin(seed)
        bar.advance(loop.done)
        order = batch_order(num_samples, total, config.batch_size, seed)
        for indices in islice(order, loop.done, None):
            loss = loop.step(own_batches(examples, indices, padding, forwards), len(indices))
            bar.advance(note=f"loss {loss:.3f}")
            if keeper is not None and loop.done < total:
                keeper.after_step(loop)
    return loop.end()


class Keeper(Protocol):
    """Keeps checkpoints within a task."""

    def resume(self, loop: TaskLoop) -> bool:
        """Take up the newest complete checkpoint, if there is one; returns whether there was one."""

    def after_step(self, loop: TaskLoop) -> None:
        """Called after every step but the last; may write a checkpoint, and may raise to end the run."""


def random_state() -> dict[str, Tensor]:
    """Return the state of torch's generators of this process."""
    state = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["random.cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(tensors: Mapping[str, Tensor]) -> None:
    """Put the generators into a state of `random_state`."""
    # torch reads a state from the start of its storage, also where it is a row of a larger tensor.
    torch.set_rng_state(tensors["random.cpu"].clone())
    if torch.cuda.is_available() and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"].clone())


@contextmanager
def training_mode(model: Any, checkpointing: bool) -> Iterator[None]:
    """Training mode inside, with activation checkpointing if `checkpointing`. Evaluation mode afterwards."""
    # transformers 5.23 has new names for these and warns at the old names. 5.17 has only the old names.
    newer = hasattr(model, "activation_checkpointing_enable")
    kind = "activation" if newer else "gradient"
    model.train()
    if checkpointing:
        getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
        # transformers makes the embeddings require gradients. Only reentrant checkpointing needs that.
        model.disable_input_require_grads()
    try:
        yield
    finally:
        model.eval()
        if checkpointing:
            getattr(model, f"{kind}_checkpointing_disable")()


def answer_loss(model: Any, batch: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Return the mean cross-entropy over the answer tokens of a batch, labels [B, T]."""
    targets = labels[:, 1:]
    positions = (targets != IGNORED).any(0).nonzero().squeeze(1)
    logits = model(**batch, use_cache=False, logits_to_keep=positions).logits.flatten(0, 1).float()
    return F.cross_entropy(logits, targets[:, positions].flatten(), ignore_index=IGNORED)
