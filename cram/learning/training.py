"""The training loop of one task: AdamW, linear warm-up and cosine over all steps, cross-entropy on answers.

Logits are computed only at positions where a row of the batch has an answer token. A method may begin a new
stage; in CRAM the expert follows the buffer. A new stage gets a fresh optimiser and stays on the
learning-rate schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cram.config import CramConfig
from cram.console import ProgressBar
from cram.learning.batches import IGNORED, Example, to_model, training_batch
from cram.methods import Method

FP16_INITIAL_LOSS_SCALE = 1024.0

Routed = Callable[[list[int]], AbstractContextManager[Any]]


def total_steps(num_samples: int, config: CramConfig) -> int:
    """Return the number of optimiser steps of a task: `max_steps` if set, else the batches of all epochs."""
    return config.max_steps or config.epochs * math.ceil(num_samples / config.batch_size)


def batch_order(num_samples: int, steps: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Yield the sample indices of every step. Each epoch has a new order and may end in a small batch."""
    generator = torch.Generator().manual_seed(seed)
    done = 0
    while done < steps:
        order = torch.randperm(num_samples, generator=generator).tolist()
        for start in range(0, num_samples, batch_size):
            if done < steps:
                yield order[start : start + batch_size]
            done += 1


def learning_rate(step: int, steps: int, config: CramConfig) -> float:
    """Return the rate of a step (from 0): linear warm-up over ceil(ratio * steps) steps, then cosine to zero.

    The usual scheduler gives the first step the rate zero. Here it is above zero, because otherwise a buffer
    that trains for one step would stay zero.
    """
    warm = math.ceil(config.lr_warmup_ratio * steps)
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def train_task(
    model: Any,
    method: Method,
    examples: Callable[[int], Example],
    routed: Routed,
    *,
    task: str,
    num_samples: int,
    padding: int,
    seed: int,
    bar: ProgressBar,
) -> float:
    """Train a method on one task.

    Args:
        model: The attached model.
        method: The method, before `begin_task`.
        examples: Sample index -> encoded training sample.
        routed: Sample indices of a batch -> context in which the batch runs forward.
        task: Name of the task.
        num_samples: Number of training samples.
        padding: Padding id.
        seed: Decides initial weights, data order and dropout.
        bar: Progress bar, one tick per step.

    Returns:
        Mean cross-entropy of the last tenth of the steps.

    Raises:
        ValueError: If the loss is not finite.
    """
    config, steps = method.config, total_steps(num_samples, method.config)
    torch.manual_seed(seed)
    method.begin_task(task, steps)
    scaler = torch.amp.GradScaler(
        model.device.type, init_scale=FP16_INITIAL_LOSS_SCALE, enabled=model.dtype == torch.float16
    )
    losses = []
    parameters: list[nn.Parameter] = []
    optimizer: torch.optim.Optimizer | None = None
    with training_mode(model, config.gradient_checkpointing), _observing(method):
        for step, indices in enumerate(batch_order(num_samples, steps, config.batch_size, seed)):
            if (fresh := method.before_step(step)) is not None:
                parameters = fresh
                optimizer = torch.optim.AdamW(parameters, weight_decay=config.weight_decay)
            assert optimizer is not None
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps, config)
            batch, labels = training_batch([examples(index) for index in indices], padding)
            with routed(indices):
                loss = answer_loss(model, to_model(batch, model), labels.to(model.device))
                state = method.cram.state
            losses.append(_finite(loss, task, step))
            extra = method.extra_loss(state)
            _update(loss if extra is None else loss + extra, parameters, optimizer, scaler, config.grad_clip)
            bar.advance(note=f"loss {losses[-1]:.3f}")
    method.end_task()
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)


@contextmanager
def _observing(method: Method) -> Iterator[None]:
    """Show automatic queries to the method inside. `batch_route` shows explicit queries itself."""
    listeners = method.cram.hooks.on_query
    if not method.uses_queries:
        yield
        return
    listeners.append(method.observe)
    try:
        yield
    finally:
        listeners.remove(method.observe)


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


def _update(
    loss: Tensor,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    clip: float,
) -> None:
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    if clip > 0:
        nn.utils.clip_grad_norm_(parameters, clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


def _finite(loss: Tensor, task: str, step: int) -> float:
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ValueError(f"loss of {task} must be finite, got {value} at step {step}")
    return value
