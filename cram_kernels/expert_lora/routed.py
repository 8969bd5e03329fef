"""Expert layer that computes its gates itself: one call from (x, query) to y."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from cram_kernels.centroid_gates.api import centroid_gates, check_router
from cram_kernels.dispatch import Op, check_devices, triton_missing, without_autocast
from cram_kernels.expert_lora import native
from cram_kernels.expert_lora.api import (
    autocast_dtype,
    check_base,
    check_segments,
    expert_lora,
)
from cram_kernels.expert_lora.dropout import seed_tensor
from cram_kernels.packing import PackedExperts


def routed_expert_lora(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    experts: PackedExperts,
    query: Tensor,
    centroids: Tensor,
    sigma: float,
    members: Tensor | None = None,
    segments: Tensor | None = None,
    *,
    dropout: float = 0.0,
    seed: int | Tensor = 0,
    impl: str = "auto",
) -> Tensor:
    """Apply `expert_lora` with the gates of `centroid_gates`, for one layer.

    Gates are float32 (float64 with float64 x). Gradients flow to x, query, centroids and the trained suffix.

    Args:
        x: Input [..., D_in].
        weight: Frozen base weight [D_out, D_in].
        bias: Frozen base bias [D_out] or None.
        experts: The packed experts (E of them).
        query: One query per segment [S, D_q].
        centroids: [E, D_q].
        sigma: Width of the distance kernel.
        members: bool [S, E], the experts each segment may use; None for all.
        segments: int [T], the query of each token; None if S divides T evenly.
        dropout: As in `expert_lora`.
        seed: As in `expert_lora`.
        impl: As in `expert_lora`. "reference", "cpu" and "native" compose the two operations; "triton"
            computes the gates inside the launch that reads x. Layers that share a query are better served by
            one `centroid_gates` for all of them.

    Returns:
        y [..., D_out] in x.dtype.

    Raises:
        ValueError: As in `expert_lora` and `centroid_gates`.
        NotImplementedError: `impl` is known but this op does not have it.

    Source: CRAM (arXiv 2606.02502), expert layer with centroid-routed weights.
    """
    if centroids.dim() != 2:
        raise ValueError(f"centroids must be [E, D_q], got {list(centroids.shape)}")
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    check_base(x, weight, bias, experts, dropout)
    check_router(query, centroids.unsqueeze(0), sigma, members)
    if centroids.shape[0] != experts.gate_columns:
        raise ValueError(f"centroids must be [{experts.gate_columns}, D_q], got {list(centroids.shape)}")
    check_devices(x.device, query=query, segments=segments)
    check_segments(x.shape[:-1].numel(), query.shape[0], segments)
    op = (SHARED_A if experts.shared_a else OP).select(impl, x.device, x.dtype)
    with without_autocast(x.device.type):
        return op(
            x, weight, bias, experts, query, centroids, sigma, members, segments, dropout=dropout, seed=seed
        )


def _composed(
    impl: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    experts: PackedExperts,
    query: Tensor,
    centroids: Tensor,
    sigma: float,
    members: Tensor | None,
    segments: Tensor | None,
    **dropout: Any,
) -> Tensor:
    gates = centroid_gates(query, centroids.unsqueeze(0), sigma, members)[0]
    return expert_lora(x, weight, bias, experts, gates, segments, impl=impl, **dropout)


def _triton(*arguments: Any, dropout: float, seed: int | Tensor) -> Tensor:
    from cram_kernels.expert_lora import routed_triton

    mask: dict[str, Any] = {"dropout": dropout, "seed": seed_tensor(seed) if dropout else None}
    return routed_triton.routed_expert_lora(*arguments, **mask)


OP = Op(
    "routed_expert_lora",
    {**{name: partial(_composed, name) for name in ("reference", "cpu", "native")}, "triton": _triton},
    {"triton": triton_missing, "native": native.missing},
)
SHARED_A = Op(
    "routed_expert_lora with a shared A",
    {name: OP.impls[name] for name in ("reference", "cpu", "native")},
    {"native": native.missing},
)
