"""A small bundle with two groups, its export, and the weights that a group must amount to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cram
from cram.model.attached import AttachedModel
from tests.cram import factories

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def small_bundle(folder: Path, **config: Any) -> tuple[Any, AttachedModel]:
    """Save the bundle of `factories.routed_llava`: experts "old" and "new" in group 0, "other" in group 1."""
    model, _, handle = factories.routed_llava(target_projections=PROJECTIONS, **config)
    cram.save(model, folder)
    return model, handle


def deltas(handle: AttachedModel, gates: dict[str, float]) -> dict[str, Tensor]:
    """Module path -> sum_e gate_e scale B_e A_e [D_out, D_in], from the model's own experts."""
    found = {}
    for path, module in handle.modules.items():
        factors = module.factors(range(handle.num_experts))
        found[path] = sum(
            (
                gates.get(name, 0.0) * handle.config.scale * (b @ a)
                for name, (a, b) in zip(handle.expert_names, factors, strict=True)
            ),
            torch.zeros(module.out_features, module.in_features),
        )
    return found
