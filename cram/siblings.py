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

from cram_kernels import stacked_expert_lora

if TYPE_CHECKING:
    from cram.experts import ExpertLinear

# Projections that read the same input in all families, in the order in which the models call them.
SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


# Where one call for several linears costs less than one each: it reads their input once there.
DEVICES = ("cuda",)


def pays(x: Tensor) -> bool:
    """Whether an input's linears are computed together."""
    return x.device.type in DEVICES


class Siblings:
    """Up to three adapted linears of one decoder layer and the results that wait for their calls."""

    def __init__(self, members: Iterable[ExpertLinear]) -> None:
        self.members = tuple(members)
        self._made_from: tuple[Any, ...] = ()
        self._waiting: dict[int, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Copies leave out waiting results, which belong to a live autograd graph."""
        return {**self.__dict__, "_made_from": (), "_waiting": {}}

    def output(self, linear: ExpertLinear, x: Tensor, gates: Tensor) -> Tensor | None:
        """The output of one member for x and gates, or None if it must be computed alone."""
        index = next(i for i, member in enumerate(self.members) if member is linear)
        source = (x, gates, torch.is_grad_enabled(), *(member.experts for member in self.members))
        if index == 0:
            self._compute(source)
        elif len(source) != len(self._made_from) or any(
            a is not b for a, b in zip(source, self._made_from, strict=True)
        ):
            return None
        found = self._waiting.pop(index, None)
        if not self._waiting:
            self._made_from = ()
        return found

    def _compute(self, source: tuple[Any, ...]) -> None:
        x, gates, _, *packs = source
        self._made_from, self._waiting = (), {}
        if any(packed is None for packed in packs) or not all(m.shares_gates for m in self.members):
            return
        layers = [
            (member.base.weight, member.base.bias, packed)
            for member, packed in zip(self.members, packs, strict=True)
        ]
        self._made_from = source
        self._waiting = dict(enumerate(stacked_expert_lora(x, layers, gates.to(x.device))))


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
