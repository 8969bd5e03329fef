"""Weights that are known again by some of their values, in whatever precision they are loaded.

A hash would change with the precision. So some values of every weight are kept, and compared with the error
that rounding to half precision makes. Weights that were trained further differ by more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

Values = Mapping[str, Sequence[float]]

# Twice the rounding to bfloat16, and below it the smallest numbers of float16.
RELATIVE, ABSOLUTE = 2.0**-7, 2.0**-23
# Multiples of the golden ratio's fraction spread over a weight without repeating its rows or columns.
_SPREAD = (math.sqrt(5) - 1) / 2
_DIGITS = 6
_KINDS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def some_values(parts: nn.Module | Iterable[tuple[str, nn.Module]], count: int, prefix: str = "") -> Values:
    """Return up to `count` values of every parameter and every saved buffer, by its name behind `prefix`.

    `parts` is a module, or all modules of one with their paths.

    Left out is what cannot be read as it is: quantised, sharded and offloaded weights, whole numbers, and
    weights with a value among the chosen ones that is not finite.
    """
    found: dict[str, list[float]] = {}
    named = parts.named_modules(remove_duplicate=False) if isinstance(parts, nn.Module) else parts
    for name, weight in _weights(named):
        if type(weight) not in (nn.Parameter, Tensor) or weight.is_meta or weight.dtype not in _KINDS:
            continue
        values = _some(weight, count)
        if values and all(map(math.isfinite, values)):
            found[prefix + name] = [float(f"{value:.{_DIGITS}g}") for value in values]
    return found


def differing(wanted: Values, found: Values) -> list[str]:
    """Return the names of weights that differ by more than rounding; names that one side lacks do not
    count."""
    return [name for name, values in wanted.items() if name in found and not are_close(found[name], values)]


def are_close(found: Sequence[float], wanted: Sequence[float]) -> bool:
    """Whether values are as many as the wanted ones, and as large but for rounding."""
    return len(found) == len(wanted) and all(
        abs(own - other) <= RELATIVE * abs(other) + ABSOLUTE for own, other in zip(found, wanted, strict=True)
    )


def _weights(parts: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, Tensor]]:
    for path, part in parts:
        own = {**part._parameters, **part._buffers}
        for name, weight in own.items():
            if weight is not None and name not in part._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, weight


def _some(weight: Tensor, count: int) -> list[float]:
    flat = weight.detach().flatten()
    size = flat.numel()
    if size > count:
        places = [int(size * ((index + 1) * _SPREAD % 1)) for index in range(count)]
        flat = flat[torch.tensor(places, device=flat.device)]
    values: list[float] = flat.tolist()
    return values
