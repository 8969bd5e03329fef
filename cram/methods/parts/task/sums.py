"""Sums that every process gathers from its own samples.

A method needs the sum over all processes. A checkpoint holds it too, for only the first process writes one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor


def over_processes(sums: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return the sums over all processes, each where it was; one process gets its own tensors.

    Args:
        sums: This process's sums; all processes have the same names and shapes.
        device: Where the processes can exchange tensors.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return dict(sums)
    found = {}
    for name, own in sums.items():
        total = own.to(device, copy=True)
        dist.all_reduce(total)
        found[name] = total.to(own.device)
    return found


def own_part(total: Tensor) -> Tensor:
    """Return this process's share of a stored sum: all of it in the first process, zeros in the others."""
    first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    return total.clone() if first else torch.zeros_like(total)
