"""Frozen linear layer with packed, gated LoRA experts."""

from cram_kernels.expert_lora.api import expert_lora
from cram_kernels.expert_lora.dropout import dropout_mask, keep_scale
from cram_kernels.expert_lora.routed import routed_expert_lora
from cram_kernels.expert_lora.stacked import bound_expert_lora, stacked_expert_lora

__all__ = [
    "bound_expert_lora",
    "dropout_mask",
    "expert_lora",
    "keep_scale",
    "routed_expert_lora",
    "stacked_expert_lora",
]
