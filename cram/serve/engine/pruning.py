"""Gates below a floor set to zero, and how far that can move a layer's output.

A layer adds sum_e g_e s B_e A_e x. Without the experts D it differs by

    || sum_{e in D} g_e s B_e A_e x ||  <=  m s max_{e in D} ||B_e A_e||_2 ||x||,     m = sum_{e in D} g_e

where m is the dropped mass. Every dropped gate is below the floor, so that m < |D| floor. The gates that stay
are not scaled up. The largest gate of a layer always stays.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cram.model.attached import AttachedModel
from cram.routing.query import Query, Route, Routes


def pruned(gates: Tensor, floor: float) -> Tensor:
    """Gates [..., E] with those below `floor` set to zero, except for the largest of each row."""
    largest = gates.amax(-1, keepdim=True)
    return torch.where((gates >= floor) | (gates == largest), gates, torch.zeros_like(gates))


def pruning_bound(cram: AttachedModel, route: Route, floor: float) -> dict[str, Tensor]:
    """Module path -> bound [S] on the change of the module's output per unit of its input's norm."""
    bounds = {}
    for path, module in cram.modules.items():
        norms = torch.stack(
            [
                torch.linalg.matrix_norm((b @ a).double(), 2)
                for a, b in module.factors(range(cram.num_experts))
            ]
        )
        gates = route.gates[module.layer].double().cpu()
        dropped = gates - pruned(gates, floor)
        largest = torch.where(dropped > 0, norms.cpu(), 0).amax(-1)
        bounds[path] = dropped.sum(-1) * cram.config.scale * largest
    return bounds


class PrunedRoutes:
    """Routes of a method with small gates set to zero; stands in for the method in `ForwardHooks.method`.

    Args:
        method: The method.
        floor: Gates below it are dropped.

    Raises:
        ValueError: If `floor` is not in [0, 1].
    """

    def __init__(self, method: Routes, floor: float) -> None:
        if not 0 <= floor <= 1:
            raise ValueError(f"gate_floor must be in [0, 1], got {floor}")
        self._method, self._floor = method, floor
        self.uses_queries = method.uses_queries

    @property
    def wants_visual_means(self) -> bool:
        """As the method."""
        return self._method.wants_visual_means

    def route(self, query: Query | None, training: bool) -> Route:
        """The method's route, pruned."""
        route = self._method.route(query, training)
        return replace(route, gates=pruned(route.gates, self._floor))
