"""Kernels of CRAM: packed LoRA experts, centroid gates, orthogonality penalty.

One public function an operation; each calls a reference, CPU, Triton or native implementation. Only torch is
needed at import.
"""

from cram_kernels.centroid_gates import api as _gates
from cram_kernels.centroid_gates import centroid_gates
from cram_kernels.crossovers import crossovers
from cram_kernels.expert_lora import api as _layer
from cram_kernels.expert_lora import (
    bound_expert_lora,
    dropout_mask,
    expert_lora,
    keep_scale,
    routed_expert_lora,
    stacked_expert_lora,
)
from cram_kernels.expert_lora import routed as _routed
from cram_kernels.expert_lora import stacked as _stacked
from cram_kernels.library import native_libraries
from cram_kernels.orthogonality import api as _penalty
from cram_kernels.orthogonality import orthogonality_penalty, orthonormal_basis, visual_mean
from cram_kernels.packing import PackedExperts, pack_experts

__all__ = [
    "PackedExperts",
    "available_impls",
    "bound_expert_lora",
    "centroid_gates",
    "crossovers",
    "dropout_mask",
    "expert_lora",
    "keep_scale",
    "native_libraries",
    "orthogonality_penalty",
    "orthonormal_basis",
    "pack_experts",
    "routed_expert_lora",
    "stacked_expert_lora",
    "visual_mean",
]


def available_impls() -> dict[str, dict[str, str | None]]:
    """Return op -> implementation -> None where it is available, else the reason."""
    modules = (_layer, _stacked, _gates, _routed, _penalty)
    return {module.OP.name: module.OP.availability() for module in modules}
