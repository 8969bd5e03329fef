"""How a bundle knows the base model that it was trained on: by some of the weights.

A hash would change with the precision in which a base is loaded. So a bundle keeps values and compares them
with the error that rounding to half precision makes. Weights that were trained further differ by more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from cram.model.frozen.forward import is_plain

VALUES_PER_WEIGHT = 128
# Twice the rounding to bfloat16, and below it the smallest numbers of float16.
RELATIVE, ABSOLUTE = 2.0**-7, 2.0**-23


def base_values(linears: Mapping[str, nn.Module]) -> list[float] | None:
    """Return values of the first and the last adapted weight, at most 128 of each.

    None where the weights cannot be read as they are: quantised, sharded or offloaded ones.
    """
    chosen = [list(linears.values())[index] for index in (0, -1)]
    if not all(map(is_plain, chosen)):
        return None
    weights = [cast(nn.Linear, linear).weight for linear in chosen]
    return (
        None if any(weight.is_meta for weight in weights) else torch.cat(list(map(_some, weights))).tolist()
    )


def check_base_values(wanted: Sequence[float] | None, linears: Mapping[str, nn.Module], folder: Path) -> None:
    """Refuse a base model with other weights than those of the bundle.

    Args:
        wanted: The bundle's values; None for a bundle without them.
        linears: The base's adapted linears, of the sizes in the bundle.
        folder: The bundle, for the message.

    Raises:
        ValueError: If a value differs by more than rounding.
    """
    found = None if wanted is None else base_values(linears)
    if found is None:
        return
    assert wanted is not None
    if len(found) != len(wanted):
        raise ValueError(f"base of {folder} must have {len(found)} values, got {len(wanted)}")
    ours, theirs = torch.tensor(found, dtype=torch.float64), torch.tensor(wanted, dtype=torch.float64)
    far = int(((ours - theirs).abs() > RELATIVE * theirs.abs() + ABSOLUTE).sum())
    if far:
        raise ValueError(
            f"model must be the base that {folder} was trained on, got other weights "
            f"({far} of {len(found)} compared values differ)"
        )


def _some(weight: Tensor) -> Tensor:
    flat = weight.detach().flatten()
    step = max(1, flat.numel() // VALUES_PER_WEIGHT)
    return flat[::step][:VALUES_PER_WEIGHT].float().cpu()
