"""Inputs of the orthogonality penalty: visual-token positions, and which module meets which input and basis.

The penalty itself is ``cram_kernels.orthogonality_penalty``. The paper's reading penalises every module on
its own input in its output space. The released code keeps one input per layer, so it penalises the layer's
first linear on the last executed linear's input, and for square modules it takes the row space of the older A
factors as the basis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cram.config import CramConfig

Basis = Literal["output", "input"]


class ModuleShape(NamedTuple):
    """Where an adapted linear sits and its sizes."""

    layer: int
    in_features: int
    out_features: int


class PenaltyTerm(NamedTuple):
    """One penalised expert: its module, the module whose input it sees, and the space of its basis."""

    module: str
    input_module: str
    basis: Basis


def penalty_terms(modules: Mapping[str, ModuleShape], config: CramConfig) -> list[PenaltyTerm]:
    """Which experts are penalised, on which input and in which space.

    Args:
        modules: all adapted linears in execution order.
        config: with ``released_code`` the released selection (one term per layer), else one term per module.

    Raises:
        ValueError: if the released selection pairs a linear with an input of another width.
    """
    if not config.released_code:
        return [PenaltyTerm(name, name, "output") for name in modules]
    first: dict[int, str] = {}
    last: dict[int, str] = {}
    for name, shape in modules.items():
        first.setdefault(shape.layer, name)
        last[shape.layer] = name
    for layer, name in first.items():
        if modules[name].in_features != modules[last[layer]].in_features:
            raise ValueError(
                f"released_code needs {name} and {last[layer]} to have inputs of equal width, "
                f"got {modules[name].in_features} and {modules[last[layer]].in_features}"
            )
    return [PenaltyTerm(name, last[layer], _released_basis(modules[name])) for layer, name in first.items()]


def _released_basis(shape: ModuleShape) -> Basis:
    return "input" if shape.in_features == shape.out_features else "output"


def history_columns(basis: Basis, older: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Columns whose span the penalty forbids, for ``orthonormal_basis``; detached.

    Args:
        basis: "output" for the columns of all b_j, "input" for the rows of all a_j (released, square).
        older: (a_j [r_j, D_in], b_j [D_out, r_j]) of the group's older experts in one module.

    Returns:
        [D_out, k] with k the sum of the ranks; "input" is [D_in, k].

    Raises:
        ValueError: if there is no older expert, so that the module has no penalty.
    """
    if not older:
        raise ValueError("older experts must not be empty, got none")
    return torch.cat([b if basis == "output" else a.mT for a, b in older], dim=1).detach()


def visual_token_mask(input_ids: Tensor, image_token_id: int, attention_mask: Tensor | None = None) -> Tensor:
    """Visual-token positions [B, T] (bool) of expanded input ids [B, T], without padding."""
    mask = input_ids == image_token_id
    return mask if attention_mask is None else mask & attention_mask.bool()
