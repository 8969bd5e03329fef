"""The tower from the public ImageNet checkpoint of EfficientNet-Lite0."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cram.base.real.tower import BLOCKS, COARSE, FINE, LiteTower, LiteTowerConfig

NORM_EPS = 1e-3  # of the normalisation that is folded in


def open_tower(checkpoint: Path) -> LiteTower:
    """The tower with the weights of the checkpoint, in bf16."""
    weights = torch.load(checkpoint, weights_only=True, map_location="cpu")
    tower = LiteTower(LiteTowerConfig())
    tower.load_state_dict(from_checkpoint(weights))
    return tower.eval().to(torch.bfloat16)


def from_checkpoint(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of `LiteTower` from the public ImageNet checkpoint, with its normalisation folded in.

    Args:
        weights: The checkpoint's tensors (`_conv_stem.weight`, `_blocks.0...`). The head is left out.
    """
    pairs = {"stem": ("_conv_stem", "_bn0")}
    for index, (_, _, _, expansion) in enumerate(BLOCKS):
        old, new = f"_blocks.{index}.", f"blocks.{index}."
        if expansion > 1:
            pairs[new + "expand"] = (old + "_expand_conv", old + "_bn0")
        pairs[new + "depthwise"] = (old + "_depthwise_conv", old + "_bn1")
        pairs[new + "project"] = (old + "_project_conv", old + "_bn2")
    folded = {}
    for name, (conv, norm) in pairs.items():
        scale = weights[f"{norm}.weight"] / (weights[f"{norm}.running_var"] + NORM_EPS).sqrt()
        folded[f"{name}.weight"] = weights[f"{conv}.weight"] * scale[:, None, None, None]
        folded[f"{name}.bias"] = weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * scale
    return folded | {"mean": torch.zeros(FINE + COARSE), "scale": torch.ones(FINE + COARSE)}
