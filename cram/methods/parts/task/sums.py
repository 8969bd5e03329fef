"""Sums that every process gathers from its own samples.

A method needs the sum over all processes. A checkpoint holds it too, for only the first process writes one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from cram.routing.means import CentroidMean


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


class GatheredMean(CentroidMean):
    """A running mean that processes update on their own, as their forwards need not be of one number."""

    def __init__(self, width: int, device: torch.device) -> None:
        """Counts no row yet; features have `width` values, and processes exchange tensors on `device`."""
        super().__init__()
        self._sum, self._device = torch.zeros(width, dtype=torch.float64, device=device), device

    def update(self, image: Tensor, has_image: Tensor | None = None) -> None:
        """Add the rows of image [N, D] in this process; `has_image` [N] says which count, None all.

        Raises:
            ValueError: If a counted row holds NaN or Inf.
        """
        rows = (image if has_image is None else image[has_image]).detach()
        if not bool(rows.isfinite().all()):
            raise ValueError("features must be finite, got NaN or Inf")
        assert self._sum is not None
        self._sum = self._sum + rows.sum(0, dtype=torch.float64).to(self._sum.device)
        self.count += len(rows)

    def export(self) -> Tensor | None:
        """Return sum and count over all processes, which all call it; None if no row was counted."""
        total = over_processes({"": self._packed()}, self._device)[""]
        return total if int(total[-1]) else None

    def restore(self, state: Tensor) -> None:
        """Take up this process's part of an exported state [D + 1]."""
        super().restore(own_part(state.to(self._device)))

    def mean(self) -> Tensor:
        """Return the mean [D] over the rows of all processes, which all call it, float32.

        Raises:
            ValueError: If no row was counted.
        """
        total = self.export()
        if total is None:
            raise ValueError("mean must follow at least one image, got none")
        return (total[:-1] / total[-1]).float()

    def _packed(self) -> Tensor:
        assert self._sum is not None
        return torch.cat([self._sum, self._sum.new_tensor([self.count])])
