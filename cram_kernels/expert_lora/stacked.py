"""Expert layers that read the same input (q, k and v; gate and up), in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cram_kernels.dispatch import Op, triton_missing
from cram_kernels.expert_lora import cpu, native, reference
from cram_kernels.expert_lora.api import autocast_dtype, check_layer, checked, sees_faults
from cram_kernels.packing import PackedExperts

MAX_STACK = 3

Layer = tuple[Tensor, Tensor | None, PackedExperts]


def stacked_expert_lora(
    x: Tensor,
    layers: Sequence[Layer],
    gates: Tensor,
    segments: Tensor | None = None,
    *,
    dropout: float = 0.0,
    seed: int | Tensor = 0,
    impl: str = "auto",
) -> tuple[Tensor, ...]:
    """Apply `expert_lora` for several layers that read the same x, with the same gates and dropout mask.

    "triton" reads x once for all of them and adds to the gradient of x once; "native" is one call without
    gradients.

    Args:
        x: Input [..., D_in].
        layers: One to three (weight [D_out_p, D_in], bias [D_out_p] or None, packed experts); as many experts
            and the same scale in each, ranks and D_out may differ.
        gates: As in `expert_lora`, used by every layer.
        segments: As in `expert_lora`.
        dropout: As in `expert_lora`; one mask on x for all layers.
        seed: As in `expert_lora`.
        impl: As in `expert_lora`.

    Returns:
        One y [..., D_out_p] a layer.

    Raises:
        ValueError: As in `expert_lora`, or the number of layers or their scales do not fit.
        NotImplementedError: `impl` is known but cannot run here.
    """
    if not 1 <= len(layers) <= MAX_STACK:
        raise ValueError(f"layers must be one to {MAX_STACK}, got {len(layers)}")
    scales = {experts.scale for _, _, experts in layers}
    if len(scales) > 1:
        raise ValueError(f"stacked layers must share their scale, got {sorted(scales)}")
    dtype = autocast_dtype(x)
    if dtype is not None:
        cast = [(w.to(dtype), None if b is None else b.to(dtype), experts) for w, b, experts in layers]
        with torch.autocast(x.device.type, enabled=False):
            return stacked_expert_lora(
                x.to(dtype), cast, gates, segments, dropout=dropout, seed=seed, impl=impl
            )
    shared = any(experts.shared_a for _, _, experts in layers)
    op = (SHARED_A if shared else OP).select(impl, x.device, x.dtype)
    by_kernel = op is native.stacked_expert_lora and sees_faults(layers, gates, segments, dropout)
    arguments = (x, layers, gates, segments, dropout)
    return tuple(checked(op, arguments, seed, partial(_check, *arguments), by_kernel))


def bound_expert_lora(x: Tensor, layers: Sequence[Layer], gates: Tensor) -> native.BoundLayers | None:
    """Check a call of `expert_lora` or `stacked_expert_lora` once for many inputs like x.

    A generated token needs few products, so that checks in Python cost as much as they do. Weights, biases
    and gates must be the same tensors in every call; their values may change.

    Args:
        x: Input [..., D_in]. Other inputs may have other numbers of tokens.
        layers: As in `stacked_expert_lora`; one layer stands for `expert_lora`.
        gates: As there.

    Returns:
        A callable x -> one y [..., D_out_p] a layer, with the bits of the functions above, or None once they
        would do something else. None in place of the callable where each call must be checked: with
        gradients, under autocast, while the compiler traces, for another implementation than "native", for
        layers that do not fit together, for experts whose trained values lie outside of the packed storage.
    """
    if torch.is_grad_enabled() or autocast_dtype(x) is not None:
        return None
    if OP.select("auto", x.device, x.dtype) is not native.stacked_expert_lora:
        return None
    packs = [experts for _, _, experts in layers]
    biased = sum(bias is not None for _, bias, _ in layers)
    if any(experts.a.dtype not in native.DTYPES for experts in packs) or biased not in (0, len(layers)):
        return None
    if not 1 <= len(layers) <= MAX_STACK or len({experts.scale for experts in packs}) > 1:
        return None
    if not all(experts.is_in_place() for experts in packs):
        return None
    return native.BoundLayers(x, layers, gates) if sees_faults(layers, gates, None, 0.0) else None


def _check(x: Tensor, layers: Sequence[Layer], *rest: Any) -> None:
    for weight, bias, experts in layers:
        check_layer(x, weight, bias, experts, *rest)


def _one_by_one(
    layer: Callable[..., Tensor], x: Tensor, layers: Sequence[Layer], *arguments: Any
) -> list[Tensor]:
    return [layer(x, weight, bias, experts, *arguments) for weight, bias, experts in layers]


def _triton(*arguments: Any) -> list[Tensor]:
    from cram_kernels.expert_lora import triton

    return triton.stacked_expert_lora(*arguments)


OP = Op(
    "stacked_expert_lora",
    {
        "reference": partial(_one_by_one, reference.expert_lora),
        "cpu": partial(_one_by_one, cpu.expert_lora),
        "triton": _triton,
        "native": native.stacked_expert_lora,
    },
    {"triton": triton_missing, "native": native.missing},
)
SHARED_A = Op(
    "stacked_expert_lora with a shared A",
    {name: OP.impls[name] for name in ("reference", "cpu", "native")},
    {"native": native.missing},
)
