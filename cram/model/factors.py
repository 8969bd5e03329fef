"""The two factors of a low-rank update B A: what they must be, and how a LoRA starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

Factors = tuple[Tensor, Tensor]  # a [r, D_in] and b [D_out, r]


class Sized(Protocol):
    """A linear as far as a LoRA must know it."""

    @property
    def in_features(self) -> int:
        """D_in."""

    @property
    def out_features(self) -> int:
        """D_out."""


def new_lora(linears: Mapping[str, Sized], rank: int) -> dict[str, Factors]:
    """A fresh LoRA per linear: A [r, D_in] kaiming-uniform with a = sqrt 5, B [D_out, r] zero.

    Args:
        linears: Name -> linear.
        rank: r; a linear with fewer inputs or outputs gets as many as it has.
    """
    factors = {}
    for name, linear in linears.items():
        kept = min(rank, linear.in_features, linear.out_features)
        factors[name] = (initial_rows(kept, linear.in_features), torch.zeros(linear.out_features, kept))
    return factors


def initial_rows(rows: int, columns: int) -> Tensor:
    """A weight [rows, columns] as `nn.Linear` starts it: kaiming-uniform with a = sqrt 5."""
    weight = torch.empty(rows, columns)
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    return weight


def check_factors(path: str, a: Tensor, b: Tensor, linear: Sized) -> None:
    """Refuse factors that do not fit a linear.

    Raises:
        ValueError: If a is not float [r, D_in], b not float [D_out, r], or a value is not finite.
    """
    in_features, out_features = linear.in_features, linear.out_features
    fits = a.dim() == b.dim() == 2 and a.shape[1] == in_features and b.shape == (out_features, a.shape[0])
    if not fits or not a.is_floating_point() or not b.is_floating_point():
        raise ValueError(
            f"weights of {path} must be float [r, {in_features}] and [{out_features}, r], "
            f"got {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
        )
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ValueError(f"weights of {path} must be finite, got NaN or Inf")
