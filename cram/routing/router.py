"""Centroid routing: level 2, soft, inside the instruction group of each sample.

    pi[l, s, k] = softmax_k( -||v_s - c[l, k]||^2 / (2 sigma^2) )      k over the experts of the group of s

One ``Router`` computes the gates of all layers in one kernel call per prefill or training forward. No
sample's gates depend on another sample, except in ``released_code`` mode, where v and t are averaged over the
batch as in the released implementation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cram.config import CramConfig
from cram.routing.groups import InstructionGroups, require_keys
from cram.routing.means import Float32Module
from cram.routing.query import Query, Route
from cram_kernels import centroid_gates

# Groups are int64; without prototypes nothing else bounds them.
MAX_GROUP = 2**63


class Router(Float32Module):
    """Groups and centroids of one attached model; grows by one expert per task.

    Attributes:
        groups: the instruction groups.
        expert_names, expert_groups: per expert, in the order in which they were added.
        frozen_centroids: [L, E_frozen, D_q] float32 buffer.
        trained_centroid: Parameter [L, D_q] of the last expert while it is being trained, else None.
    """

    frozen_centroids: Tensor
    expert_group_ids: Tensor
    leads_group: Tensor
    trained_centroid: nn.Parameter | None

    def __init__(self, config: CramConfig, num_layers: int) -> None:
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        super().__init__()
        self.config = config
        self.num_layers = num_layers
        self.groups = InstructionGroups(config)
        self.expert_names: list[str] = []
        self.expert_groups: list[int] = []
        self.register_parameter("trained_centroid", None)
        self.register_buffer("frozen_centroids", torch.zeros(num_layers, 0, 0))
        self.register_buffer("expert_group_ids", torch.zeros(0, dtype=torch.int64), persistent=False)
        self.register_buffer("leads_group", torch.zeros(0, dtype=torch.bool), persistent=False)

    @property
    def num_experts(self) -> int:
        """E, the expert in training included."""
        return len(self.expert_names)

    def experts_of(self, group: int) -> list[int]:
        """Indices of the group's experts, oldest first."""
        return [index for index, owner in enumerate(self.expert_groups) if owner == group]

    def centroids(self) -> Tensor:
        """Centroids [L, E, D_q] of all experts; the last row carries the gradient of the trained one."""
        if self.trained_centroid is None:
            return self.frozen_centroids
        trained = self.trained_centroid[:, None]
        frozen = self.frozen_centroids
        return torch.cat([frozen, trained], dim=1) if frozen.shape[1] else trained

    def route(self, query: Query, group: int | None = None) -> Route:
        """Computes the gates of all layers.

        Args:
            query: features of S samples.
            group: the locked group of a training batch; None assigns a group to each sample.

        Returns:
            Gates that are exactly zero outside the sample's group. A sample without an image gives weight 1
            to its group's first expert; a sample whose group has no expert gets zeros, hence the base model.

        Raises:
            ValueError: if the feature widths do not match, a feature is NaN or Inf, or a group is needed and
                none exists.
        """
        if not bool(query.image.isfinite().all()):
            raise ValueError("image features must be finite, got NaN or Inf")
        used = query.batch_mean() if self.config.released_code else query
        groups = self._groups(used, group)
        return Route(self._gates(used, groups), groups, query)

    def gamma(self, route: Route) -> Tensor:
        """Reusability gamma [L, S] of the penalty: a route's gate mass of the group's older experts.

        Per sample also in ``released_code`` mode, as the released penalty does. The gradient reaches the
        trained centroid.

        Raises:
            ValueError: if no expert is being trained, or the route is of other experts or of no query.
        """
        if self.trained_centroid is None or route.query is None or route.groups is None:
            raise ValueError("gamma must be of a query's route while an expert is trained, got another one")
        if route.gates.shape[2] != self.num_experts:
            raise ValueError(f"gates must be of {self.num_experts} experts, got {route.gates.shape[2]}")
        gates = self._gates(route.query, route.groups) if self.config.released_code else route.gates
        return gates[:, :, :-1].sum(-1)

    def add_expert(self, name: str, group: int, centroid: Tensor, trained: bool = True) -> None:
        """Appends an expert to a group.

        Args:
            name: a name no other expert has.
            group: index of its instruction group.
            centroid: [D_q] (copied to every layer) or [L, D_q].
            trained: keep the centroid as the parameter ``trained_centroid`` until ``freeze``.

        Raises:
            ValueError: on a used name, a negative group, a wrong shape, NaN/Inf, or while another expert is
                trained.
        """
        if self.trained_centroid is not None:
            raise ValueError(f"{self.expert_names[-1]!r} must be frozen before adding one, got {name!r}")
        if name in self.expert_names:
            raise ValueError(f"expert name must be new, got {name!r} among {self.expert_names}")
        if group < 0:
            raise ValueError(f"group must be at least 0, got {group}")
        rows = self._layer_rows(centroid)
        if trained:
            self.trained_centroid = nn.Parameter(rows)
        else:
            self._append_frozen(rows)
        self.expert_names.append(name)
        self.expert_groups.append(group)
        self._index_experts()

    def clear(self) -> None:
        """Drops all experts; the groups stay."""
        self.expert_names, self.expert_groups = [], []
        self.trained_centroid = None
        self.frozen_centroids = self.frozen_centroids.new_zeros(self.num_layers, 0, 0)
        self._index_experts()

    def freeze(self) -> None:
        """Turns the trained centroid into a frozen row.

        Raises:
            ValueError: if no expert is being trained.
        """
        if self.trained_centroid is None:
            raise ValueError("freeze must follow add_expert(trained=True), got no trained expert")
        self._append_frozen(self.trained_centroid.detach().clone())
        self.trained_centroid = None

    def export_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values of the groups and experts, for ``import_state``."""
        tensors, values = self.groups.export_state()
        tensors["centroids"] = self.centroids().detach().clone()
        experts = [list(pair) for pair in zip(self.expert_names, self.expert_groups, strict=True)]
        return tensors, {**values, "experts": experts}

    def import_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Replaces groups and experts by exported ones; every expert becomes frozen.

        Raises:
            ValueError: if a key is missing, the centroids do not match the experts and layers or hold
                NaN/Inf, a name repeats, or an expert's group does not exist; the state is then unchanged.
        """
        require_keys(tensors, "centroids", "prototypes")
        require_keys(values, "experts")
        centroids, experts = tensors["centroids"], values["experts"]
        names, owners = _expert_table(experts, len(tensors["prototypes"]))
        if centroids.dim() != 3 or centroids.shape[:2] != (self.num_layers, len(experts)):
            raise ValueError(
                f"centroids must be [{self.num_layers}, {len(experts)}, D_q], got {list(centroids.shape)}"
            )
        if not bool(centroids.isfinite().all()):
            raise ValueError("centroids must be finite, got NaN or Inf")
        self.groups.import_state(tensors, values)
        self.expert_names, self.expert_groups = names, owners
        self.trained_centroid = None
        self.frozen_centroids = centroids.detach().to(self.frozen_centroids.device, torch.float32, copy=True)
        self._index_experts()

    def _groups(self, query: Query, group: int | None) -> Tensor:
        if group is not None or not self.num_experts:
            return torch.full((len(query),), group or 0, dtype=torch.int64, device=query.text.device)
        return self.groups.assign(query.text)

    def _gates(self, query: Query, groups: Tensor) -> Tensor:
        """Gates [L, S, E]; a lone member weighs exactly 1, so image-less samples need no other path."""
        centroids = self.centroids().to(query.image.device)
        if not self.num_experts:
            return query.image.new_zeros(self.num_layers, len(query), 0)
        if query.image.shape[1] != centroids.shape[2]:
            raise ValueError(f"image must have D_q={centroids.shape[2]} columns, got {query.image.shape[1]}")
        members = self.expert_group_ids.to(groups.device) == groups[:, None]
        members = members & (query.has_image[:, None] | self.leads_group.to(groups.device))
        trained = int(self.trained_centroid is not None)
        return centroid_gates(query.image, centroids, self.config.sigma, members, trained=trained)

    def _layer_rows(self, centroid: Tensor) -> Tensor:
        """Checks a new centroid and returns its own float32 copy as [L, D_q] on the router's device."""
        width = self.frozen_centroids.shape[2] if self.num_experts else centroid.shape[-1]
        if centroid.shape not in ((width,), (self.num_layers, width)) or not width:
            wanted = f"[{width}] or [{self.num_layers}, {width}]"
            raise ValueError(f"centroid must be {wanted}, got {list(centroid.shape)}")
        if not bool(centroid.isfinite().all()):
            raise ValueError("centroid must be finite, got NaN or Inf")
        rows = centroid.detach().to(self.frozen_centroids.device, torch.float32)
        return rows.expand(self.num_layers, width).clone()

    def _append_frozen(self, rows: Tensor) -> None:
        frozen = self.frozen_centroids.reshape(self.num_layers, -1, rows.shape[1])
        self.frozen_centroids = torch.cat([frozen.to(rows.device), rows[:, None]], dim=1)

    def _index_experts(self) -> None:
        device = self.frozen_centroids.device
        first = [self.expert_groups.index(group) == index for index, group in enumerate(self.expert_groups)]
        self.expert_group_ids = torch.tensor(self.expert_groups, dtype=torch.int64, device=device)
        self.leads_group = torch.tensor(first, dtype=torch.bool, device=device)


def _expert_table(experts: Any, groups: int) -> tuple[list[str], list[int]]:
    """Names and groups of imported experts; without prototypes (fixed routes only) every group is legal."""
    limit = groups or MAX_GROUP

    def legal(entry: Any) -> bool:
        pair = isinstance(entry, list | tuple) and [type(part) for part in entry] == [str, int]
        return pair and 0 <= entry[1] < limit

    wellformed = isinstance(experts, list) and all(legal(entry) for entry in experts)
    if not wellformed or len({name for name, _ in experts}) != len(experts):
        raise ValueError(f"experts must be [name, group below {groups}], names distinct, got {experts!r}")
    return [name for name, _ in experts], [group for _, group in experts]
