"""Instruction groups: level 1 of the routing, hard, one group per answer format.

A task's first training batch decides its group by comparing the layer-normalised mean text feature with the
prototypes; the task is then locked and every later batch moves the prototype as a running mean. At inference
each sample takes the group with the most similar prototype, without a task id.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cram.config import CramConfig
from cram.routing.means import Float32Module, reduced_sum


def normalise_text(features: Tensor) -> Tensor:
    """LayerNorm without affine (eps 1e-5) over the last dimension, in float32."""
    return F.layer_norm(features.detach().float(), features.shape[-1:])


def require_keys(state: Mapping[str, Any], *names: str) -> None:
    """Raises ValueError unless an imported state has all the names."""
    if missing := [name for name in names if name not in state]:
        raise ValueError(f"state must have {list(names)}, got {sorted(state)} without {missing}")


class InstructionGroups(Float32Module):
    """Prototypes, counts and task locks of the instruction groups; any number of groups up to ``max_groups``.

    Attributes:
        prototypes: [G, D_t] float32, running means of layer-normalised batch means (not re-normalised).
        counts: [G] int64, batches absorbed by each prototype.
        locks: task name -> group.
    """

    prototypes: Tensor
    counts: Tensor

    def __init__(self, config: CramConfig) -> None:
        super().__init__()
        self.config = config
        self.locks: dict[str, int] = {}
        self.register_buffer("prototypes", torch.zeros(0, 0))
        self.register_buffer("counts", torch.zeros(0, dtype=torch.int64))

    def __len__(self) -> int:
        return self.prototypes.shape[0]

    def observe(self, task: str, features: Tensor) -> int:
        """Absorbs one training batch of ``task`` and returns the batch's group.

        The first batch joins the only group if the cosine exceeds ``group_merge_similarity``, joins the best
        of several if it leads the second by more than ``group_margin``, and otherwise opens a group. When
        ``max_groups`` exist already, a batch that would open one takes the best group without a lock and
        without changing any state, and the next batch decides again. Under ``torch.distributed`` the batch is
        the union over ranks.

        Args:
            task: name of the task.
            features: [B, D_t] text features, any float dtype.

        Raises:
            ValueError: on a wrong shape or NaN/Inf; the state is then unchanged.
        """
        self._check(features)
        total, count = reduced_sum(features)
        text = normalise_text(total / count)
        if task not in self.locks:
            group, decided = self._decide(text)
            if not decided:
                return group
            self.locks[task] = group
        group = self.locks[task]
        self._absorb(group, text)
        return group

    def lock(self, task: str, group: int) -> None:
        """Fixes the group of a task that is still ambiguous when its expert is built.

        Raises:
            ValueError: if the group does not exist or the task is locked to another one.
        """
        if not 0 <= group < len(self):
            raise ValueError(f"group must be in [0, {len(self)}), got {group}")
        if self.locks.setdefault(task, group) != group:
            raise ValueError(f"task {task!r} must keep its group {self.locks[task]}, got {group}")

    def assign(self, features: Tensor) -> Tensor:
        """Groups [S] (int64) of samples at inference: argmax cosine of LayerNorm(features [S, D_t]).

        Raises:
            ValueError: if no group exists, on a wrong shape or on NaN/Inf.
        """
        if not len(self):
            raise ValueError("assign must come after a first observed batch, got no groups")
        self._check(features)
        if not bool(features.isfinite().all()):
            raise ValueError("features must be finite, got NaN or Inf")
        return self.similarity(normalise_text(features)).argmax(-1)

    def similarity(self, text: Tensor) -> Tensor:
        """Cosines [..., G] of layer-normalised features [..., D_t] to the prototypes.

        Not a matrix product: autocast would round that to half precision, and the order of its sums may
        depend on the batch.
        """
        prototypes = F.normalize(self.prototypes.to(text.device), dim=-1)
        return (F.normalize(text, dim=-1)[..., None, :] * prototypes).sum(-1)

    def export_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values from which ``import_state`` restores the groups."""
        tensors = {"prototypes": self.prototypes.clone(), "counts": self.counts.clone()}
        return tensors, {"locks": dict(self.locks)}

    def import_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Replaces the state by an exported one.

        Raises:
            ValueError: on a missing key, shapes that do not match, NaN/Inf, counts below 1, more than
                ``max_groups`` groups or a lock that names no group; the state is then unchanged.
        """
        require_keys(tensors, "prototypes", "counts")
        require_keys(values, "locks")
        prototypes, counts, locks = tensors["prototypes"], tensors["counts"], values["locks"]
        if prototypes.dim() != 2 or counts.shape != prototypes.shape[:1] or counts.dtype != torch.int64:
            raise ValueError(
                f"prototypes and int64 counts must be [G, D_t] and [G], got {list(prototypes.shape)} and "
                f"{counts.dtype} {list(counts.shape)}"
            )
        groups = prototypes.shape[0]
        if groups > self.config.max_groups:
            raise ValueError(f"groups must not exceed max_groups={self.config.max_groups}, got {groups}")
        if not bool(prototypes.isfinite().all()) or not bool((counts >= 1).all()):
            raise ValueError("prototypes must be finite with counts of at least 1, got other values")
        if not isinstance(locks, dict):
            raise ValueError(f"locks must be groups by task, got {locks!r:.100}")
        if bad := {task: g for task, g in locks.items() if type(g) is not int or not 0 <= g < groups}:
            raise ValueError(f"locks must name groups in [0, {groups}), got {bad}")
        device = self.prototypes.device
        self.prototypes = prototypes.detach().to(device, torch.float32, copy=True)
        self.counts = counts.to(device, copy=True)
        self.locks = dict(locks)

    def _check(self, features: Tensor) -> None:
        width = self.prototypes.shape[1] if len(self) else None
        if features.dim() != 2 or not features.numel() or not features.is_floating_point():
            raise ValueError(
                f"features must be a non-empty float [B, D_t], got {features.dtype} {list(features.shape)}"
            )
        if width is not None and features.shape[1] != width:
            raise ValueError(f"features must have D_t={width} columns, got {features.shape[1]}")

    def _decide(self, text: Tensor) -> tuple[int, bool]:
        """Group of an unlocked task's batch and whether it may be locked; index G means a new group."""
        if not len(self):
            return 0, True
        best = self.similarity(text).topk(min(2, len(self)))
        if len(self) == 1:
            clear = float(best.values[0]) > self.config.group_merge_similarity
        else:
            clear = float(best.values[0] - best.values[1]) > self.config.group_margin
        if clear or len(self) >= self.config.max_groups:
            return int(best.indices[0]), clear
        return len(self), True

    def _absorb(self, group: int, text: Tensor) -> None:
        """Running mean m <- (n m + t) / (n + 1); opens the group if its index is G."""
        if group == len(self):
            older = self.prototypes.to(text.device).reshape(group, text.numel())
            self.prototypes = torch.cat([older, text[None]])
            self.counts = torch.cat([self.counts, self.counts.new_ones(1)]).to(text.device)
            return
        count = self.counts[group]
        self.prototypes[group] = (count * self.prototypes[group] + text.to(count.device)) / (count + 1)
        self.counts[group] += 1
