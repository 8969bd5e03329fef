"""The orthogonality penalty of the expert in training, over all modules of an attached model.

Inputs are the layers' visual-token means and the current route; the bases depend only on older experts and
are computed once per task.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from cram.config import CramConfig
from cram.experts import ExpertLinear
from cram.penalty import ModuleShape, PenaltyTerm, history_columns, penalty_terms
from cram.routing import Router
from cram_kernels import orthogonality_penalty, orthonormal_basis


class Penalty:
    """Bases of one task and the value after a training forward.

    Attributes:
        needed: Whether the expert's group has older experts; otherwise the value is 0 and no input is pooled.
    """

    def __init__(self, modules: Mapping[str, ExpertLinear], router: Router, config: CramConfig) -> None:
        """Computes the bases.

        Raises:
            ValueError: If no expert is in training.
        """
        if router.trained_centroid is None:
            raise ValueError(
                "prepare_penalty must follow add_expert(trained=True), got no expert in training"
            )
        self._modules, self._router, self._config = modules, router, config
        older = router.experts_of(router.expert_groups[-1])[:-1]
        shapes = {path: ModuleShape(m.layer, m.in_features, m.out_features) for path, m in modules.items()}
        self._terms = penalty_terms(shapes, config) if older else []
        self._bases = [self._basis(term, older) for term in self._terms]
        self.needed = bool(older) and config.penalty_weight > 0

    def _basis(self, term: PenaltyTerm, older: list[int]) -> Tensor:
        return orthonormal_basis(history_columns(term.basis, self._modules[term.module].factors(older)))

    def value(self) -> Tensor:
        """The weighted penalty of the last training forward, a scalar; 0 if it is not needed."""
        if not self.needed:
            return torch.zeros((), device=self._router.frozen_centroids.device)
        gamma = self._router.gamma()
        hidden, trained_a, trained_b, gammas = [], [], [], []
        for term in self._terms:
            module, source = self._modules[term.module], self._modules[term.input_module].hidden
            assert module.experts is not None and source is not None
            assert module.experts.trained_a is not None and module.experts.trained_b is not None
            hidden.append(F.dropout(source, self._config.dropout))
            trained_a.append(module.experts.trained_a)
            trained_b.append(module.experts.trained_b)
            gammas.append(gamma[module.layer])
        value = orthogonality_penalty(
            hidden, trained_a, trained_b, self._bases, gammas, scale=self._config.scale
        )
        return self._config.penalty_weight * value
