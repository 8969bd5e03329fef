"""Expert layer that computes its gates itself: one call from (x, query) to y."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from cram_kernels.centroid_gates.api import centroid_gates
from cram_kernels.dispatch import Op
from cram_kernels.expert_lora.api import expert_lora
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
    seed: int = 0,
    impl: str = "auto",
) -> Tensor:
    """Apply `expert_lora` with the gates of `centroid_gates`, for one layer.

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
        impl: As in `expert_lora`. "reference" and "cpu" compose the two operations, "cpu" with the
            rank-packed layer.

    Returns:
        y [..., D_out] in x.dtype.

    Raises:
        ValueError: As in `expert_lora` and `centroid_gates`.
        NotImplementedError: `impl` is known but this op does not have it.

    Source: CRAM (arXiv 2606.02502), expert layer with centroid-routed weights.
    """
    if centroids.dim() != 2:
        raise ValueError(f"centroids must be [E, D_q], got {list(centroids.shape)}")
    layer = OP.select(impl, x.device)
    gates = centroid_gates(query, centroids.unsqueeze(0), sigma, members)[0]
    return layer(x, weight, bias, experts, gates, segments, dropout=dropout, seed=seed)


OP = Op(
    "routed_expert_lora",
    {"reference": partial(expert_lora, impl="reference"), "cpu": partial(expert_lora, impl="cpu")},
)
