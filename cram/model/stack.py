"""Adapted linears that read the same input (q, k and v; gate and up), computed in one call.

A model calls them one after another with the same tensor. The first call computes all of them, and each later
one takes its result. A result is handed out only to a call with exactly what it was computed from; anything
else computes its linear alone.

The decode steps behind one prefill repeat a call with another x. They bind it once and then only compare
whether something was exchanged; a changed call is made anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from cram_kernels import PackedExperts, bound_expert_lora, stacked_expert_lora

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


class Bound:
    """A call that decode steps repeat: of one linear, or of all members of a stack.

    Args:
        members: The linears, in the order in which the model calls them.
        layers: What they were bound with; see `Stackable.as_layer`.
        call: The call of `cram_kernels.bound_expert_lora`.
    """

    __slots__ = ("_call", "_places", "_results", "_seen", "_x")

    def __init__(self, members: Sequence[nn.Module], layers: Sequence[Layer], call: Any) -> None:
        self._call = call
        self._places = {member: index for index, member in enumerate(members)}
        self._seen = [_parts(*each) for each in zip(members, layers, strict=True)]
        self._x: Tensor | None = None
        self._results: list[Tensor | None] = []

    def output(self, linear: nn.Module, x: Tensor) -> Tensor | None:
        """The output of a member for x, or None if its call must be made anew."""
        place = self._places[linear]
        if place == 0:
            self._x = None
            try:
                found = self._call(x) if _unchanged(self._seen) else None
            except RuntimeError:
                return None  # the call that is made anew says what is wrong
            if found is None or len(found) == 1:
                return None if found is None else found[0]
            self._x, self._results = x, list(found)
        elif self._x is not x or not _unchanged(self._seen[place : place + 1]):
            return None
        elif place == len(self._seen) - 1:
            self._x = None
        found, self._results[place] = self._results[place], None
        return found


def bound(members: Sequence[Any], x: Tensor, gates: Tensor) -> Bound | None:
    """Bind the call of some members for inputs like x, or None where each call must be made anew."""
    if any(member.training for member in members):
        return None
    layers = [layer for member in members if (layer := member.as_layer()) is not None]
    if len(layers) < len(members):
        return None
    call = bound_expert_lora(x, layers, placed(gates, x))
    return None if call is None else Bound(members, layers, call)


def _parts(linear: nn.Module, layer: Layer) -> tuple[Any, ...]:
    """What a bound call compares of a member, in dictionaries: each attribute costs a token a microsecond."""
    modules: Any = linear._modules
    base = modules["base"]
    return linear.__dict__, modules, base, base.__dict__, base._parameters, *layer, modules.get("gating")


def _unchanged(members: Sequence[tuple[Any, ...]]) -> bool:
    """Whether members are computed from the same tensors as before; see `plain_tensors`."""
    for linear, modules, base, own, parameters, weight, bias, experts, gating in members:
        if (
            linear["training"]
            or modules["base"] is not base
            or type(base) is not nn.Linear
            or modules["experts"] is not experts
            or modules.get("solo") is not None
            or modules.get("gating") is not gating
            or parameters.get("weight") is not weight
            or parameters.get("bias") is not bias
            or own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own
        ):
            return False
    return True


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
