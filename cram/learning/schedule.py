"""The steps of a task, from the configuration and the seed alone: how many, which samples, which rate."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch

from cram.config import CramConfig


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


def task_seed(seed: int, index: int) -> int:
    """Return the seed of a task's training. Interruptions of the run do not change it."""
    digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
