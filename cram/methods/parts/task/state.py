"""The tensors of a task in training, for a checkpoint within the task.

trained.<i>               the parameters in training, in the optimiser's order
gating.<module>.<name>    the buffers of the modules' gatings; sums are those over all processes
mean.<name>               a running mean: its sum and, last, its count; float64
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cram.methods.parts.task.sums import over_processes, own_part
from cram.model.attached import AttachedModel
from cram.routing.means import CentroidMean

TRAINED = "trained."


def task_tensors(cram: AttachedModel, means: Mapping[str, CentroidMean]) -> dict[str, Tensor]:
    """Return copies of the tensors of the task in training, on the CPU."""
    found: dict[str, Tensor] = {
        f"{TRAINED}{index}": p.detach() for index, p in enumerate(cram.trainable_parameters())
    }
    exported = {name: mean.export() for name, mean in means.items()}
    found |= {f"mean.{name}": state for name, state in exported.items() if state is not None}
    found |= _gating_buffers(cram)
    found |= over_processes(_gathered(cram), cram.device)
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in found.items()}


@torch.no_grad()
def load_task_tensors(
    cram: AttachedModel, means: Mapping[str, CentroidMean], tensors: Mapping[str, Tensor]
) -> None:
    """Put the tensors of `task_tensors` into a task that has begun in the same way.

    Raises:
        ValueError: If a tensor is missing or has another shape.
    """
    own = {f"{TRAINED}{index}": p.detach() for index, p in enumerate(cram.trainable_parameters())}
    gathered = _gathered(cram)
    for name, tensor in {**own, **_gating_buffers(cram)}.items():
        value = stored(tensors, name, tuple(tensor.shape))
        tensor.copy_(own_part(value) if name in gathered else value)
    for name, mean in means.items():
        if f"mean.{name}" in tensors:
            mean.restore(tensors[f"mean.{name}"])


def stored(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """Return one tensor of a checkpoint.

    Raises:
        ValueError: If it is missing or has another shape.
    """
    found = tensors.get(name)
    if found is None or tuple(found.shape) != shape:
        got = "none" if found is None else str(list(found.shape))
        raise ValueError(f"{name} of the checkpoint must have shape {list(shape)}, got {got}")
    return found


def _gating_buffers(cram: AttachedModel) -> dict[str, Tensor]:
    return {
        f"gating.{path}.{name}": buffer
        for path, module in cram.modules.items()
        if module.gating is not None
        for name, buffer in module.gating.named_buffers()
    }


def _gathered(cram: AttachedModel) -> dict[str, Tensor]:
    """The buffers that sum over each process's own samples."""
    return {
        f"gating.{path}.{name}": getattr(module.gating, name)
        for path, module in cram.modules.items()
        if module.gating is not None
        for name in module.gating.gathered
    }
