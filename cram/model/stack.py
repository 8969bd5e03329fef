"""Adapted linears that read the same input (q, k and v; gate and up), computed in one call.

A model calls them one after another with the same tensor. The first call computes all of them, and each later
one takes its result. A result is handed out only to a call with exactly what it was computed from; anything
else computes its linear alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cram_kernels import PackedExperts, stacked_expert_lora

if TYPE_CHECKING:
    from cram.model.linear import ExpertLinear

# Projections that read the same input in all families, in the order in which the models call them.
SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


# Where one call for several linears costs less than one each also in training.
DEVICES = ("cuda",)


def pays(x: Tensor) -> bool:
    """Whether an input's linears are computed together."""
    return not torch.is_grad_enabled() or x.device.type in DEVICES


class Siblings:
    """Up to three adapted linears of one decoder layer and the results that wait for their calls."""

    def __init__(self, members: Iterable[ExpertLinear]) -> None:
        self.members = tuple(members)
        self._made_from: tuple[Any, ...] = ()
        self._waiting: dict[int, tuple[PackedExperts, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Copies leave out waiting results, which belong to a live autograd graph."""
        return {**self.__dict__, "_made_from": (), "_waiting": {}}

    def output(self, linear: ExpertLinear, experts: PackedExperts, x: Tensor, gates: Tensor) -> Tensor | None:
        """The output of one member with what acts in it, for x and gates, or None if it must be computed
        alone."""
        index = self.members.index(linear)
        if index == 0:
            self._compute(x, gates)
        if self._waiting.get(index, (None,))[0] is not experts or not self._made_from_these(x, gates):
            return None
        found = self._waiting.pop(index)[1]
        if not self._waiting:
            self._made_from = ()
        return found

    def _made_from_these(self, x: Tensor, gates: Tensor) -> bool:
        made_x, made_gates, differentiable = self._made_from
        return made_x is x and made_gates is gates and differentiable == torch.is_grad_enabled()

    def _compute(self, x: Tensor, gates: Tensor) -> None:
        self._made_from, self._waiting = (x, gates, torch.is_grad_enabled()), {}
        packs = [packed for member in self.members if (packed := member.acting) is not None]
        if len(packs) < len(self.members) or not all(member.shares_gates for member in self.members):
            return
        layers: list[tuple[Tensor, Tensor | None, PackedExperts]] = [
            (member.base.weight, member.base.bias, packed)
            for member, packed in zip(self.members, packs, strict=True)
        ]
        found = stacked_expert_lora(x, layers, gates.to(x.device))
        self._waiting = dict(enumerate(zip(packs, found, strict=True)))


def join_siblings(modules: Mapping[str, ExpertLinear]) -> None:
    """Tell linears, by their full path, which of them read the same input."""
    for projections in SHARED_INPUT:
        for path in modules:
            parent, _, name = path.rpartition(".")
            members = [f"{parent}.{each}" for each in projections if f"{parent}.{each}" in modules]
            if name == projections[0] and len(members) > 1:
                siblings = Siblings(modules[member] for member in members)
                for member in siblings.members:
                    member.siblings = siblings
