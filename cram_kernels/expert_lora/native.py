"""expert_lora in one native call each way, the base linear included; stacked_expert_lora without gradients.

    forward     Z = drop(X) A^T    U = Z o w    Y = X W0^T + b + U Bt
    backward    V = dY Bt^T    dZ = V o w    dX = dY W0 + drop(dZ A)    dg_e = s * sum of Z o V
                dA = dZ^T drop(X)    dBt = U^T dY    both for the trained suffix only

w are the gates of each packed row, times the scale. No intermediate of activation size is made, nothing is
cast beforehand, and Python reads no gate. Sums run in float32; bfloat16 operands are multiplied in pairs
where the CPU can. Saved: Z (all columns for gate gradients, else the trained ones), the gates, and x if the
trained suffix needs it. Up to a few dozen tokens the forward computes the base linear too and writes Y once;
beyond, torch does, and Y is read and written once more. With a shared A [r, D_in] row c of Bt belongs to row
c mod r of A. Other bytes beyond the base linear: A and Bt once, X once more; 2 T R (D_in + D_out) FLOPs.
Where bfloat16 products round float32 factors anyway, a frozen pack is read from its copy in bfloat16.
Kernels: csrc/expert_lora/forward.cpp and backward.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from cram_kernels.crossovers import rounds_factors
from cram_kernels.dispatch import check_one_device, constant_when_compiled, in_forward_mode
from cram_kernels.expert_lora.dropout import dropped_lanes, keep_scale, seed_words
from cram_kernels.library import library_missing
from cram_kernels.once import once_differentiable
from cram_kernels.packing import PackedExperts

DTYPES = (torch.float32, torch.bfloat16)
NAME = "cram::packed_expert_lora"


def missing(device: torch.device | None, dtype: torch.dtype | None) -> str | None:
    """Return why the layer cannot serve such tensors, or None; then it is ready to be called."""
    if device is not None and device.type != "cpu":
        return f"tensors must be on a CPU device, got {device}"
    if dtype is not None and dtype not in DTYPES:
        return f"dtype must be one of {DTYPES}, got {dtype}"
    return _ready()


@constant_when_compiled
def _ready() -> str | None:
    """Return why the library is missing, or None; then what the compiler must know is registered."""
    reason = library_missing("cpu")
    if reason is None:
        _register()
    return reason


# What the compiler takes in place of the words, which it cannot know while it traces.
SEEDED = {
    "forward": "Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor bt, Tensor owner, Tensor gates, "
    "float scale, int first, int dropped, Tensor seed) -> (Tensor y, Tensor z)",
    "backward": "Tensor dy, Tensor? x, Tensor z, Tensor weight, Tensor a, Tensor bt, Tensor owner, "
    "Tensor gates, float scale, int tail, int dropped, Tensor seed, bool need_x, bool need_gates, "
    "bool need_a, bool need_b) -> (Tensor dx, Tensor dgates, Tensor da, Tensor db)",
}


@cache
def _register() -> torch.library.Library:
    """Register what the compiler must know; the library lives as long as this result."""
    library = torch.library.Library("cram", "FRAGMENT")
    fakes: dict[str, Any] = {"forward": _fake_forward, "backward": _fake_backward}
    for name, schema in SEEDED.items():
        library.define(f"packed_expert_lora_{name}.seeded({schema}")
        library.impl(f"packed_expert_lora_{name}.seeded", partial(_with_words, name), "CPU")
        for overload in ("", ".seeded"):
            torch.library.register_fake(f"{NAME}_{name}{overload}", fakes[name], lib=library)
    torch.library.register_fake(NAME, _fake, lib=library)
    torch.library.register_fake(f"{NAME}_stack", _fake_stack, lib=library)
    return library


def _with_words(name: str, *arguments: Any) -> Any:
    """Compute a seeded operation by the one that takes the words."""
    place = {"forward": -1, "backward": -5}[name]
    words = seed_words(int(arguments[place]))
    operation = getattr(torch.ops.cram, f"packed_expert_lora_{name}").default
    return operation(*arguments[:place], *words, *arguments[len(arguments) + place + 1 :])


def expert_lora(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    experts: PackedExperts,
    gates: Tensor,
    segments: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    """Compute the layer natively; arguments as in `cram_kernels.expert_lora`, already checked."""
    a, bt, owner, *trained = _storage(experts, x.dtype)
    scale = experts.scale
    words: tuple[int, ...] = (0, 0, 0)
    if seed is not None:
        scale *= keep_scale(dropout)
        words = (dropped_lanes(dropout),)
        if not torch.compiler.is_compiling():
            words, seed = (*words, *seed_words(int(seed))), None
    if torch.is_grad_enabled() and (x.requires_grad or gates.requires_grad or experts.trained):
        return _ExpertLora.apply(x, gates, *trained, weight, bias, a, bt, owner, segments, scale, words, seed)
    if segments is not None:
        gates = gates.index_select(0, segments)
    if dropout:
        return _forward(x, weight, bias, a, bt, owner, gates, scale, bt.shape[0], words, seed)[0]
    return torch.ops.cram.packed_expert_lora.default(x, weight, bias, a, bt, owner, gates, scale)


def stacked_expert_lora(
    x: Tensor,
    layers: Sequence[tuple[Tensor, Tensor | None, PackedExperts]],
    gates: Tensor,
    segments: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> list[Tensor]:
    """Compute layers that read one x; arguments as in `cram_kernels.stacked_expert_lora`, already checked.

    With gradients, dropout, or a bias in some layers alone, one call a layer.
    """
    weights = [weight for weight, _, _ in layers]
    biases = [bias for _, bias, _ in layers if bias is not None]
    packs = [experts for _, _, experts in layers]
    trains = torch.is_grad_enabled() and (
        x.requires_grad or gates.requires_grad or any(experts.trained for experts in packs)
    )
    if trains or dropout or len(biases) not in (0, len(layers)):
        return [expert_lora(x, *layer, gates, segments, dropout, seed) for layer in layers]
    a, bt, owners, *_ = zip(*(_storage(experts, x.dtype) for experts in packs), strict=True)
    if segments is not None:
        gates = gates.index_select(0, segments)
    found: list[Tensor] = torch.ops.cram.packed_expert_lora_stack.default(
        x, weights, biases, a, bt, owners, gates, packs[0].scale
    )
    return found


class BoundLayers:
    """A call of one layer or of a stack of them, in which x alone is open.

    Args:
        x: An input.
        layers: As in `stacked_expert_lora`, with a bias in all of them or in none.
        gates: As there, without segments.
    """

    __slots__ = ("_dtype", "_operation", "_packs", "_rest", "_stacked")

    def __init__(
        self, x: Tensor, layers: Sequence[tuple[Tensor, Tensor | None, PackedExperts]], gates: Tensor
    ) -> None:
        weights, biases, packs = zip(*layers, strict=True)
        storages = [_storage(experts, x.dtype)[:3] for experts in packs]
        self._dtype, self._stacked = x.dtype, len(layers) > 1
        self._packs = [_looked_at(*each) for each in zip(packs, storages, strict=True)]
        operations = torch.ops.cram
        if self._stacked:
            self._operation = operations.packed_expert_lora_stack.default
            biases = () if biases[0] is None else biases
            factors: Any = zip(*storages, strict=True)
        else:
            self._operation = operations.packed_expert_lora.default
            (weights,), (biases,), (factors,) = weights, biases, storages
        self._rest = (weights, biases, *factors, gates, packs[0].scale)

    def __call__(self, x: Tensor) -> Sequence[Tensor] | None:
        """One y [..., D_out_p] a layer, or None if the call is another for x than when it was bound.

        Raises:
            RuntimeError: If the kernel cannot compute x with these layers.
        """
        if x.dtype is not self._dtype or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return None
        if in_forward_mode():
            return None
        for own, buffers, a, bt, owner, scale, versions, parameters, leaves in self._packs:
            if buffers["a"] is not a or buffers["bt"] is not bt or buffers["expert_of_row"] is not owner:
                return None
            if own["scale"] != scale or (versions is not None and versions != (a._version, bt._version)):
                return None
            for name, leaf, address in leaves:
                if parameters.get(name) is not leaf or leaf.data_ptr() != address:
                    return None
        found: Any = self._operation(x, *self._rest)
        return found if self._stacked else (found,)


def _looked_at(experts: PackedExperts, storage: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """What a bound call compares of a pack. Copies of its factors belong to one version of their values."""
    own, buffers, parameters = experts.__dict__, experts._buffers, experts._parameters
    a, bt = experts.a, experts.bt
    versions = None if storage[0] is a else (a._version, bt._version)
    leaves = [(name, leaf, leaf.data_ptr()) for name, leaf in parameters.items() if leaf is not None]
    return own, buffers, a, bt, experts.expert_of_row, experts.scale, versions, parameters, leaves


def _storage(experts: PackedExperts, dtype: torch.dtype) -> tuple[Any, ...]:
    """Return A, Bt and the gate column of each packed row, in types that kernels read, and the two leaves."""
    a, bt, *trained = experts.factors()
    # nn.Module finds a buffer by name after its own attributes, at a microsecond each.
    buffers: Any = experts._buffers
    if a.dtype not in DTYPES:
        a, bt = a.to(dtype), bt.to(dtype)
    elif dtype is torch.bfloat16 and trained[0] is None and not torch.compiler.is_compiling():
        a, bt = experts.narrowed() if rounds_factors() else (a, bt)
    return a, bt, buffers["expert_of_row"], *trained


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Call the operation: with the words of the seed or, where the compiler traces, with the seed itself."""
    *head, words, seed = arguments
    operation = torch.ops.cram.packed_expert_lora_forward
    if seed is None:
        return operation.default(*head, *words)
    return operation.seeded(*head, *words, seed)


class _ExpertLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gates: Tensor,
        trained_a: Tensor | None,
        trained_b: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        bt: Tensor,
        owner: Tensor,
        segments: Tensor | None,
        scale: float,
        words: tuple[int, ...],
        seed: Tensor | None,
    ) -> Tensor:
        _, need_gates, need_a, need_b = ctx.needs_input_grad[:4]
        tail = bt.shape[0] - (trained_b.shape[0] if trained_b is not None else 0)
        first = 0 if need_gates else tail if need_b else bt.shape[0]
        rows = gates if segments is None else gates.index_select(0, segments)
        y, z = _forward(x, weight, bias, a, bt, owner, rows, scale, first, words, seed)
        ctx.save_for_backward(x if need_a else None, z, gates, segments, owner, weight, a, bt, seed)
        ctx.tail, ctx.scale, ctx.words = tail, scale, words
        ctx.dtype = None if trained_a is None or trained_a.dtype == a.dtype else trained_a.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # Both guards cost microseconds and are rarely needed.
        backward = _backward_once if torch.is_grad_enabled() else _backward
        if not torch.is_autocast_enabled(dy.device.type):
            return backward(ctx, dy)
        with torch.autocast(dy.device.type, enabled=False):
            return backward(ctx, dy)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, z, gates, segments, owner, weight, a, bt, seed = ctx.saved_tensors
    needs = ctx.needs_input_grad[:4]
    rows = gates if segments is None else gates.index_select(0, segments)
    operation, words = torch.ops.cram.packed_expert_lora_backward, ctx.words
    chosen, words = (operation.default, words) if seed is None else (operation.seeded, (*words, seed))
    found = chosen(dy, x, z, weight, a, bt, owner, rows, ctx.scale, ctx.tail, *words, *needs)
    dx, dgates, da, db = (grad if need else None for grad, need in zip(found, needs, strict=True))
    if dgates is not None and segments is not None:
        dgates = torch.zeros_like(gates).index_add(0, segments, dgates)
    if ctx.dtype is not None:
        da, db = (None if grad is None else grad.to(ctx.dtype) for grad in (da, db))
    return dx, dgates, da, db, *[None] * 9


_backward_once = once_differentiable(_backward)


def _fake(x: Tensor, weight: Tensor, *factors: Any) -> Tensor:
    check_one_device(x, weight, *factors)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _fake_stack(x: Tensor, weights: Sequence[Tensor], *factors: Any) -> list[Tensor]:
    check_one_device(x, *factors)
    return [_fake(x, weight) for weight in weights]


def _fake_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    bt: Tensor,
    owner: Tensor,
    gates: Tensor,
    scale: float,
    first: int,
    *words: int,
) -> tuple[Tensor, Tensor]:
    return _fake(x, weight, bias, a, bt, owner, gates), x.new_empty(x.shape[:-1].numel(), bt.shape[0] - first)


def _fake_backward(
    dy: Tensor,
    x: Tensor | None,
    z: Tensor,
    weight: Tensor,
    a: Tensor,
    bt: Tensor,
    owner: Tensor,
    gates: Tensor,
    scale: float,
    tail: int,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_one_device(dy, x, z, weight, a, bt, owner, gates)
    *_, need_x, need_gates, need_a, need_b = rest
    trained = bt.shape[0] - tail
    of_a = trained if a.shape[0] == bt.shape[0] else a.shape[0]
    return (
        dy.new_empty(*dy.shape[:-1], weight.shape[1]) if need_x else dy.new_empty(0, 0),
        gates.new_empty(gates.shape[0] if need_gates else 0, gates.shape[1]),
        a.new_empty(of_a if need_a else 0, a.shape[1]),
        bt.new_empty(trained if need_b else 0, bt.shape[1]),
    )
