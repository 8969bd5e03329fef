"""How a bundle knows the base model that it was trained on: by some values of every weight.

See `cram.values` for the comparison. Weights of other names (transformers renames modules from time to time)
and weights that cannot be read are not compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cram.model.frozen.forward import is_plain
from cram.model.linear import ExpertLinear
from cram.values import Values, are_close, differing, some_values

VALUES_PER_WEIGHT = 16
# Before format 4: values of the first and of the last adapted weight, in one list.
OLDER_VALUES_PER_WEIGHT = 128
NAMES_SHOWN = 3


def base_values(model: nn.Module) -> Values:
    """Return up to 16 values of every weight of the base, by its name in the base; experts are left out."""
    return some_values(_base_parts(model), VALUES_PER_WEIGHT)


def _base_parts(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All modules of the base by their paths in it; an adapted linear stands for its base."""
    if isinstance(module, ExpertLinear):
        module = module.base
    yield path, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _base_parts(child, f"{path}.{name}" if path else name)


def check_base_values(wanted: Values, found: Values, folder: Path) -> None:
    """Refuse a base model with other weights than those of the bundle.

    Args:
        wanted: The bundle's values.
        found: The model's.
        folder: The bundle, for the message.

    Raises:
        ValueError: If a weight differs by more than rounding.
    """
    far = differing(wanted, found)
    if far:
        more = f" and {len(far) - NAMES_SHOWN} more" if len(far) > NAMES_SHOWN else ""
        raise ValueError(
            f"model must be the base that {folder} was trained on, got other weights in "
            f"{', '.join(far[:NAMES_SHOWN])}{more}"
        )


def check_older_values(wanted: Sequence[float], linears: Sequence[nn.Linear], folder: Path) -> None:
    """Refuse a base model with other weights than those of a bundle before format 4.

    Args:
        wanted: The bundle's values.
        linears: The base's adapted linears, of the sizes in the bundle.
        folder: The bundle, for the message.

    Raises:
        ValueError: If a value differs by more than rounding.
    """
    ends = linears[0], linears[-1]
    if not all(map(is_plain, ends)) or any(linear.weight.is_meta for linear in ends):
        return
    found = [value for linear in ends for value in _older(linear.weight)]
    if len(found) != len(wanted):
        raise ValueError(f"base of {folder} must have {len(found)} values, got {len(wanted)}")
    if not are_close(found, wanted):
        raise ValueError(
            f"model must be the base that {folder} was trained on, got other weights in its first or last "
            "adapted linear"
        )


def _older(weight: Tensor) -> list[float]:
    flat = weight.detach().flatten()
    step = max(1, flat.numel() // OLDER_VALUES_PER_WEIGHT)
    values: list[float] = flat[::step][:OLDER_VALUES_PER_WEIGHT].to(torch.float32).tolist()
    return values
