"""KeepLoRA (ICLR 2026): one LoRA per task, whose A is fixed outside of all that base and older tasks use.

Faithful to the released code. P is an orthonormal basis of input directions per linear. It begins with the
left singular vectors of W0^T up to 0.6 of its energy. In each task:

1. The gradient G of the weight, with the older tasks merged, is summed over a fifth of the data. The rows of
   A are the top left singular vectors of (I - P^T P) G^T.
2. Only B is trained, from zero.
3. G is summed again, with the task merged. P gains the left singular vectors of (I - P^T P) G^T that it needs
   to hold 0.99 of G's energy.

All tasks have gate 1, so that their sum is what the released code merges.

Own readings:
* The first sum is made in the first fifth of the task's steps, in which nothing is trained. The second one is
  made in the last fifth, while B is still trained. The released code reads the data before and after.
* Rank, scale and projections are the configuration's. The released code has rank 32 and scale 1/4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cram.methods.base import Method, MethodState
from cram.methods.parts.directions import missing_directions, outside, top_directions
from cram.methods.parts.gradients import WeightGradients
from cram.methods.parts.task.state import load_task_tensors, stored
from cram.model.attached import AttachedModel

BASE_ENERGY, TASK_ENERGY = 0.6, 0.99
GATHERED = 0.2  # of a task's steps
A, GRADIENT = "a.", "gradient."


def gathered_steps(total_steps: int) -> int:
    """Return the steps at each end of a task that gather gradients."""
    return max(1, round(GATHERED * total_steps))


class KeepLoraMethod(Method):
    """Each task trains the B of a LoRA whose A keeps out of the directions in use."""

    name = "keeplora"
    trains_a = False

    def __init__(self, cram: AttachedModel) -> None:
        super().__init__(cram)
        self._gradients = WeightGradients(cram.modules)
        self._base: dict[str, Tensor] = {}
        self._kept = {path: torch.zeros(0, m.in_features) for path, m in cram.modules.items()}
        self._gather = self._again = 0

    def check_steps(self, task: str, total_steps: int) -> None:
        """Refuse a task that has no step left for the training of B."""
        if (gather := gathered_steps(total_steps)) >= total_steps:
            raise ValueError(f"task {task!r} must have at least {gather + 1} steps, got {total_steps}")

    def begin_task(self, task: str, total_steps: int) -> None:
        """Add an expert that is zero until its A is chosen."""
        self.check_steps(task, total_steps)
        self._gather = gathered_steps(total_steps)
        self._again = max(self._gather, total_steps - self._gather)
        rank = self.config.rank
        zero = {
            path: (torch.zeros(rank, m.in_features), torch.zeros(m.out_features, rank))
            for path, m in self.cram.modules.items()
        }
        self.cram.add_expert(task, zero)
        for a in self._trained_a().values():
            a.requires_grad_(False)

    def before_step(self, step: int) -> list[nn.Parameter] | None:
        """Gather gradients at both ends of the task; return B where it is new."""
        if step == self._gather:
            for path, gradient in self._gradients.stop().items():
                space, rows = self._space(path), self._trained_a()[path]
                rows.data.copy_(top_directions(outside(gradient.to(space), space), len(rows)))
        if step in (0, self._again):
            self._gradients.start()
        return self.cram.trainable_parameters() if step in (0, self._gather) else None

    def end_task(self) -> None:
        """Freeze the LoRA, and add to P what the task uses; a task that has ended too early is refused."""
        if not (self._gradients.gathering and any(a.any() for a in self._trained_a().values())):
            raise ValueError(f"a task must end after step {self._again}, got an earlier end")
        for path, gradient in self._gradients.stop().items():
            space = self._space(path)
            fresh = missing_directions(gradient.to(space), space, TASK_ENERGY)
            self._kept[path] = torch.cat([self._kept[path], fresh.cpu()])
        self.cram.freeze()

    def release(self) -> None:
        """Take the hooks out of the model."""
        self._gradients.stop()

    def export_state(self) -> MethodState:
        """Return the rows of P that the tasks have added, by module; the base's own are made again."""
        kept = {path: rows.contiguous() for path, rows in self._kept.items() if len(rows)}
        return MethodState(kept, {})

    def import_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take up the rows of P.

        Raises:
            ValueError: If a module is unknown or the rows do not fit it.
        """
        for path, rows in tensors.items():
            width = self._kept[path].shape[1] if path in self._kept else None
            if rows.dim() != 2 or rows.shape[1] != width or not 0 < len(rows) <= rows.shape[1]:
                raise ValueError(f"method state {path} must be [k, {width}], got {list(rows.shape)}")
        for path, rows in self._kept.items():
            self._kept[path] = tensors[path].clone() if path in tensors else rows[:0]

    def export_training(self) -> MethodState:
        """Return B, A and the gradients that are being summed."""
        tensors, values = super().export_training()
        tensors |= {A + path: a.detach().cpu().clone() for path, a in self._trained_a().items()}
        tensors |= {GRADIENT + path: sums.clone() for path, sums in self._gradients.totals().items()}
        return MethodState(tensors, values)

    def import_training(
        self, task: str, total_steps: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
    ) -> None:
        """Begin a task again and take up an exported training."""
        self.begin_task(task, total_steps)
        load_task_tensors(self.cram, {}, tensors)
        for path, a in self._trained_a().items():
            a.data.copy_(stored(tensors, A + path, tuple(a.shape)))
        if any(name.startswith(GRADIENT) for name in tensors):
            shapes = {path: (m.out_features, m.in_features) for path, m in self.cram.modules.items()}
            sums = {path: stored(tensors, GRADIENT + path, shape) for path, shape in shapes.items()}
            self._gradients.start(sums)

    def _trained_a(self) -> dict[str, nn.Parameter]:
        packs = {path: module.experts for path, module in self.cram.modules.items()}
        return {p: e.trained_a for p, e in packs.items() if e is not None and e.trained_a is not None}

    def _space(self, path: str) -> Tensor:
        """P [k, D_in] of a module, on its device."""
        module = self.cram.modules[path]
        if path not in self._base:
            weight = module.weight.detach().float()
            empty = weight.new_zeros(0, module.in_features)
            self._base[path] = missing_directions(weight, empty, BASE_ENERGY, below=True)
        return torch.cat([self._base[path], self._kept[path].to(self._base[path])])
