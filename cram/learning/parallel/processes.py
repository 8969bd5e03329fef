"""Several processes that train one model: the share of each, and what they add up.

Every process has the whole model, in the same state. A step's samples are divided between the processes. The
gradients of the expert in training, a few megabytes, are added up in one message; the base is frozen and has
none. Without a process group every function here is that of one process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cram.console import KNOWN_ERRORS

T = TypeVar("T")
# How long processes wait for one another: the first one may read all pictures and weights alone.
PATIENCE = timedelta(hours=2)


def world() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if world() > 1 else 0


def is_first() -> bool:
    """True for the process that writes files and shows progress."""
    return rank() == 0


def own_share(items: Sequence[T]) -> list[T]:
    """Return this process's part: every `world()`-th item. A process can get none."""
    return list(items[rank() :: world()])


def totals(*values: float) -> list[float]:
    """Return the sums of some numbers over all processes."""
    if world() == 1:
        return list(values)
    summed = torch.tensor(values, dtype=torch.float64, device=_device())
    dist.all_reduce(summed)
    return [float(value) for value in summed]


def gathered_rows(rows: Tensor) -> Tensor:
    """Return the rows [n, ...] of all processes, in the order of the processes. n may differ and be 0."""
    if world() == 1:
        return rows
    local = rows.to(_device())
    counts = [torch.zeros(1, dtype=torch.int64, device=local.device) for _ in range(world())]
    dist.all_gather(counts, counts[0].new_tensor([len(local)]))
    sizes = [int(count) for count in counts]
    padded = local.new_zeros(max(sizes), *local.shape[1:])
    padded[: len(local)] = local
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).to(rows.device)


def sum_gradients(parameters: Sequence[nn.Parameter], factor: float = 1.0) -> None:
    """Replace every gradient by `factor` times its sum over all processes.

    A parameter without a gradient in every process keeps none, as in one process.
    """
    if world() == 1 or not parameters:
        return
    device = _device()
    parts = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in parameters]
    present = torch.tensor([float(p.grad is not None) for p in parameters], device=device)
    flat = torch.cat([present, *(part.detach().flatten().to(device, torch.float32) for part in parts)])
    dist.all_reduce(flat)
    sums = flat[len(parts) :].mul_(factor).split([part.numel() for part in parts])
    for parameter, found, total in zip(parameters, flat[: len(parts)].tolist(), sums, strict=True):
        if found:
            parameter.grad = total.view(parameter.shape).to(parameter.device, parameter.dtype)


@torch.no_grad()
def copy_from_first(tensors: Sequence[Tensor]) -> None:
    """Give every process the first process's values, in place.

    Raises:
        ValueError: If a shape differs between the processes.
    """
    if world() == 1:
        return
    sizes = [float(sum(tensor.numel() for tensor in tensors)), float(len(tensors))]
    if totals(*sizes) != [size * world() for size in sizes]:
        raise ValueError(f"all processes must train the same shapes, got {sizes[0]:.0f} values in this one")
    for tensor in tensors:
        shared = tensor.detach().to(_device(), copy=True)
        dist.broadcast(shared, 0)
        tensor.copy_(shared)


def by_first(action: Callable[[], T]) -> T:
    """Return what `action` returns in the first process. The other processes wait and do not run it.

    Raises:
        ValueError: In the other processes, with the text of the first one's error.
    """
    if world() == 1:
        return action()
    found: list[tuple[T | None, str | None]] = [(None, None)]
    fault: BaseException | None = None
    if is_first():
        try:
            found = [(action(), None)]
        except KNOWN_ERRORS as error:
            fault, found = error, [(None, str(error) or type(error).__name__)]
    dist.broadcast_object_list(found, 0, device=_device())
    if fault is not None:
        raise fault
    result, text = found[0]
    if text is not None:
        raise ValueError(text)
    return result  # type: ignore[return-value]


@contextmanager
def joined(device: str | None = None) -> Iterator[None]:
    """Be one of the processes that a launcher (torchrun, accelerate launch) has started, inside.

    Args:
        device: "cpu" joins over gloo. Otherwise a CUDA device is used over NCCL, if there is one.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" or dist.is_initialized():
        yield
        return
    on_gpu = torch.cuda.is_available() and not (device or "cuda").startswith("cpu")
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def own_device(device: str | None) -> str | None:
    """Return the device of this process: its own GPU where there are several processes on GPUs."""
    if world() > 1 and dist.get_backend() == "nccl":
        return f"cuda:{torch.cuda.current_device()}"
    return device


def _device() -> torch.device:
    """Where messages lie: NCCL wants the GPU, gloo the CPU."""
    on_gpu = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
