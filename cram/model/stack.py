"""Adapted linears that read the same input (q, k and v; gate and up), computed in one call.

A model calls them one after another with the same tensor. The first call computes all of them, and each later
one takes its result. A result is handed out only to a call with exactly what it was computed from; anything
else computes its linear alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from cram_kernels import PackedExperts, stacked_expert_lora

# Projections that read the same input in all families, in the order in which the models call them.
SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


# Where one call for several linears costs less than one each also in training.
DEVICES = ("cuda",)


# What `cram_kernels.stacked_expert_lora` takes of one layer: weight, bias and experts.
Layer = tuple[Tensor, Tensor | None, PackedExperts]


class Stackable(Protocol):
    """An adapted linear as far as its stack must know it."""

    stack: Stack | None

    def as_layer(self) -> Layer | None:
        """What is computed from the weight, with the route's gates; None for anything else."""


def pays(x: Tensor) -> bool:
    """Whether an input's linears are computed together."""
    return not torch.is_grad_enabled() or x.device.type in DEVICES


def placed(gates: Tensor, x: Tensor) -> Tensor:
    """The gates where x is."""
    return gates if gates.device == x.device else gates.to(x.device)


class Waiting(NamedTuple):
    """Results that wait for their calls, and what they were computed from.

    Attributes:
        x: The input.
        gates: The gates.
        differentiable: Whether gradients were on.
        results: By the member's index the experts that acted and the output.
    """

    x: Tensor
    gates: Tensor
    differentiable: bool
    results: dict[int, tuple[PackedExperts, Tensor]]

    def fits(self, x: Tensor, gates: Tensor) -> bool:
        """Whether a call has exactly these inputs."""
        return self.x is x and self.gates is gates and self.differentiable == torch.is_grad_enabled()


class Stack:
    """Adapted linears of one decoder layer and the results that wait for their calls."""

    def __init__(self, members: Iterable[Stackable]) -> None:
        self.members = tuple(members)
        self._waiting: Waiting | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies leave out waiting results, which belong to a live autograd graph."""
        return {**self.__dict__, "_waiting": None}

    def output(self, linear: Stackable, experts: PackedExperts, x: Tensor, gates: Tensor) -> Tensor | None:
        """The output of one member with what acts in it, for x and gates, or None if it must be computed
        alone."""
        index = self.members.index(linear)
        # Read once: another thread's forward may replace it at any moment.
        waiting = self._computed(x, gates) if index == 0 else self._waiting
        if waiting is None or not waiting.fits(x, gates):
            return None
        acted, found = waiting.results.pop(index, (None, None))
        if not waiting.results:
            self._waiting = None
        return found if acted is experts else None

    def _computed(self, x: Tensor, gates: Tensor) -> Waiting | None:
        self._waiting = None
        layers: list[Layer] = []
        for member in self.members:
            layer = member.as_layer()
            if layer is None:
                return None
            layers.append(layer)
        found = stacked_expert_lora(x, layers, placed(gates, x))
        results = {index: (layers[index][2], y) for index, y in enumerate(found)}
        self._waiting = Waiting(x, gates, torch.is_grad_enabled(), results)
        return self._waiting


def join_stacks(linears: Mapping[str, Stackable]) -> None:
    """Tell linears, by their full path, which of them read the same input."""
    for projections in SHARED_INPUT:
        for path in linears:
            parent, _, name = path.rpartition(".")
            members = [f"{parent}.{each}" for each in projections if f"{parent}.{each}" in linears]
            if name == projections[0] and len(members) > 1:
                stack = Stack(linears[member] for member in members)
                for member in stack.members:
                    member.stack = stack
