"""The orthogonality penalty of the expert in training, over all modules of an attached model.

The penalty is a function of one forward's state: the route, and each module's mean input over the image
tokens. As the paper is read here, every module is penalised on its own input, in its output space. The
released code keeps one input per layer: it penalises the layer's first linear on the last executed linear's
input. For square modules its basis is the row space of the older A factors.

The bases depend only on older experts, and older experts never change. Each task extends every basis by one
expert. A model that was loaded from a bundle gets the same bits as a model that has learnt all tasks itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cram.config import CramConfig
from cram.model.attached import AttachedModel
from cram.model.state import ForwardState
from cram.routing.router import Router
from cram_kernels import orthogonality_penalty, orthonormal_basis

Basis = Literal["output", "input"]


class ModuleShape(NamedTuple):
    """Layer and sizes of an adapted linear."""

    layer: int
    in_features: int
    out_features: int


class PenaltyTerm(NamedTuple):
    """One penalised module, the module whose input the penalty uses, and the space of the basis."""

    module: str
    input_module: str
    basis: Basis


def penalty_terms(modules: Mapping[str, ModuleShape], config: CramConfig) -> list[PenaltyTerm]:
    """Lists the penalised modules, each with its input and its space.

    Args:
        modules: All adapted linears in execution order.
        config: With ``released_code`` there is one term per layer, else one term per module.

    Raises:
        ValueError: If the released selection pairs a linear with an input of another width.
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
    """Returns the columns whose span the penalty forbids, detached, for ``orthonormal_basis``.

    Args:
        basis: "output" takes the columns of all b_j. "input" takes the rows of all a_j (released, square).
        older: (a_j [r_j, D_in], b_j [D_out, r_j]) of the group's older experts in one module.

    Returns:
        [D_out, k] for "output" and [D_in, k] for "input". k is the sum of the ranks.

    Raises:
        ValueError: If there is no older expert. Then the module has no penalty.
    """
    if not older:
        raise ValueError("older experts must not be empty, got none")
    return torch.cat([b if basis == "output" else a.mT for a, b in older], dim=1).detach()


class HistoryBases:
    """Orthonormal bases of the spaces that experts of one attached model span, kept from task to task.

    The bases are derived data. They are not saved; a missing basis is made from the experts. A basis belongs
    to one pool of experts (`AttachedModel.pool`). If the experts were replaced, every basis is made anew.
    """

    def __init__(self) -> None:
        """Starts without bases."""
        self._pool: object = None
        self._held: dict[tuple[str, Basis, int], tuple[list[int], Tensor]] = {}

    def get(self, term: PenaltyTerm, cram: AttachedModel, experts: list[int]) -> Tensor:
        """Returns the basis [D, k] of some frozen experts of the term's module. New experts extend it.

        Args:
            term: Module and space.
            cram: The model.
            experts: One group's frozen experts in order, at least one.
        """
        if self._pool is not cram.pool:
            self._pool, self._held = cram.pool, {}
        module, key = cram.modules[term.module], (term.module, term.basis, experts[0])
        covered, basis = self._held.get(key, ([], None))
        if covered != experts[: len(covered)]:
            covered, basis = [], None
        for index in experts[len(covered) :]:
            columns = history_columns(term.basis, module.factors([index]))
            basis = orthonormal_basis(columns, None if basis is None else basis.to(columns.device))
        assert basis is not None
        self._held[key] = (list(experts), basis)
        return basis.to(module.weight.device)


class Penalty:
    """Bases of one task, and the penalty of each of its training forwards.

    Attributes:
        needed: True if the expert's group has older experts. Otherwise the value is 0 and no input is pooled.
    """

    def __init__(self, cram: AttachedModel, router: Router, bases: HistoryBases) -> None:
        """Brings the bases up to date.

        Args:
            cram: The model with the expert in training.
            router: Groups and centroids.
            bases: The bases of earlier tasks. They are extended.

        Raises:
            ValueError: If no expert is in training.
        """
        if router.trained_centroid is None:
            raise ValueError(
                "prepare_penalty must follow add_expert(trained=True), got no expert in training"
            )
        modules = cram.modules
        self._modules, self._router, self._config = modules, router, cram.config
        older = router.experts_of(router.expert_groups[-1])[:-1]
        shapes = {path: ModuleShape(m.layer, m.in_features, m.out_features) for path, m in modules.items()}
        self._terms = penalty_terms(shapes, cram.config) if older else []
        self._bases = [bases.get(term, cram, older) for term in self._terms]
        self._layers = torch.tensor([modules[term.module].layer for term in self._terms])
        self.needed = bool(older) and cram.config.penalty_weight > 0

    def value(self, state: ForwardState) -> Tensor:
        """Returns the weighted penalty of the training forward with this state, a scalar. 0 if not needed.

        Raises:
            ValueError: If the forward kept no inputs, or if no query routed it.
        """
        if not self.needed:
            return torch.zeros((), device=self._router.frozen_centroids.device)
        if state.visual is None or state.route is None:
            raise ValueError("penalty must follow a forward in training mode, got the state of another one")
        gamma = self._router.gamma(state.route)
        hidden, trained_a, trained_b = [], [], []
        for term in self._terms:
            experts = self._modules[term.module].experts
            assert experts is not None and experts.trained_a is not None and experts.trained_b is not None
            hidden.append(state.hidden[term.input_module])
            trained_a.append(experts.trained_a)
            trained_b.append(experts.trained_b)
        gammas = gamma[self._layers.to(gamma.device)]
        value = orthogonality_penalty(
            self._dropped(hidden), trained_a, trained_b, self._bases, gammas, scale=self._config.scale
        )
        return self._config.penalty_weight * value

    def _dropped(self, hidden: list[Tensor]) -> list[Tensor]:
        """Dropout on the means of every term. One draw serves all terms."""
        if not self._config.dropout:
            return hidden
        flat = F.dropout(torch.cat([each.flatten() for each in hidden]), self._config.dropout)
        pieces = flat.split([each.numel() for each in hidden])
        return [piece.view(each.shape) for piece, each in zip(pieces, hidden, strict=True)]
