"""Experts in instruction groups. The distance from an image's features to the centroids chooses experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cram.methods.base import Method, MethodState
from cram.model.attached import AttachedModel
from cram.model.factors import Factors
from cram.routing.query import Query, Route
from cram.routing.router import Router

MAX_COUNT = 2**63


class GroupedMethod(Method):
    """A method whose experts each have a group and a centroid.

    Attributes:
        router: Groups and centroids.
        locked_group: The group that automatic routing uses while the model is in training mode. With None,
            every sample is routed by its own text.
    """

    uses_queries = True

    def __init__(self, cram: AttachedModel) -> None:
        super().__init__(cram)
        self.router = Router(self.config, cram.num_layers).to(cram.device)
        self.locked_group: int | None = None

    def route(self, query: Query | None, training: bool) -> Route:
        """Return centroid gates inside each sample's group. In training mode, a locked group serves all.

        Raises:
            ValueError: If there is no query, if an expert has no group, or as `Router.route`.
        """
        if query is None:
            raise ValueError("cram must see a query to route, got none")
        return self.route_within(query, self.locked_group if training else None)

    def route_within(self, query: Query, group: int | None) -> Route:
        """Return the route of S samples inside one group. With None, each sample gets its own group."""
        if self.router.expert_names != self.cram.expert_names:
            raise ValueError(
                "every expert must have a group and a centroid (`model.cram.method.add_expert`), "
                f"got {self.router.expert_names} of the experts {self.cram.expert_names}"
            )
        return self.router.route(query, group)

    def history(self, group: int) -> dict[str, list[Tensor]]:
        """Return the factors a [r, D_in] of the group's experts per module, oldest first."""
        members = self.router.experts_of(group)
        return {path: [a for a, _ in module.factors(members)] for path, module in self.cram.modules.items()}

    @contextmanager
    def training_group(self, group: int) -> Iterator[None]:
        """Lock the group inside the context; see `locked_group`."""
        before, self.locked_group = self.locked_group, group
        try:
            yield
        finally:
            self.locked_group = before

    def add_expert(
        self,
        name: str,
        weights: Mapping[str, Factors],
        group: int = 0,
        centroid: Tensor | None = None,
        trained: bool = True,
    ) -> None:
        """Appends an expert to every module and to the router. If a check fails, nothing changes.

        Args:
            name: A new name.
            weights: Module path -> (a [r, D_in], b [D_out, r]). The rank may differ per module and may be 0.
            group: The expert's instruction group.
            centroid: [D_q] or [L, D_q], trained with the expert. None stands for zeros that are not trained.
            trained: True if the expert is trained from here on. Older experts are frozen.

        Raises:
            ValueError: As `AttachedModel.add_expert` and `Router.add_expert`, or if the centroid does not
                have the encoder's width.
        """
        width = self.cram.encoder.image_dim
        rows = torch.zeros(width) if centroid is None else centroid
        if rows.shape[-1] != width:
            raise ValueError(f"centroid must have D_q={width} columns, got {list(rows.shape)}")
        self.cram.check_expert(name, weights)
        self.router.add_expert(name, group, rows, trained and centroid is not None)
        self.cram.add_expert(name, weights, trained)

    def extra_parameters(self) -> list[nn.Parameter]:
        """Return the centroid of the expert in training."""
        centroid = self.router.trained_centroid
        return [] if centroid is None or self.cram.hooks.solo_in_training else [centroid]

    def experts_replaced(self) -> None:
        """Forget all centroids. The groups stay."""
        self.router.clear()

    def freeze(self) -> None:
        """Ends the training of expert and centroid.

        Raises:
            ValueError: If no expert is in training.
        """
        self.cram.freeze()
        if self.router.trained_centroid is not None:
            self.router.freeze()

    def expert_groups(self) -> dict[str, int]:
        """Return expert -> instruction group."""
        return dict(zip(self.router.expert_names, self.router.expert_groups, strict=True))

    def values_per_expert(self) -> int:
        """Return the number of values of one expert's centroids in all layers."""
        return self.cram.num_layers * self.cram.encoder.image_dim

    def export_state(self) -> MethodState:
        """Return groups and centroids.

        Raises:
            ValueError: If an expert of the model has no group, so that nothing could lead to it.
        """
        names, routed = self.cram.expert_names, list(self.router.expert_names)
        if names != routed:
            raise ValueError(
                f"experts must have a group and a centroid, got {names} of which {routed} have them; add "
                "them by `model.cram.method.add_expert`"
            )
        tensors, values = self.router.export_state()
        counts = tensors.pop("counts").tolist()
        return MethodState(tensors, {**values, "counts": counts})

    def import_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take up groups and centroids of the experts that are in the model.

        Raises:
            ValueError: As `Router.import_state`, or if the state belongs to other experts.
        """
        if not tensors and not self.cram.num_experts:
            return
        counts, experts = values.get("counts"), values.get("experts")
        if not isinstance(counts, list) or not all(type(n) is int and 0 < n < MAX_COUNT for n in counts):
            raise ValueError(f"counts must be integers from 1 to below {MAX_COUNT}, got {counts!r:.100}")
        listed = experts if isinstance(experts, list) else []
        names = [entry[0] if isinstance(entry, list) and entry else None for entry in listed]
        if names != self.cram.expert_names:
            raise ValueError(f"experts must be {self.cram.expert_names}, got {experts!r:.200}")
        encoder = self.cram.encoder
        widths = {"centroids": encoder.image_dim, "prototypes": encoder.text_dim}
        for name, width in widths.items():
            found = tensors.get(name)
            if found is not None and found.numel() and found.shape[-1] != width:
                raise ValueError(f"{name} must have the encoder's {width} columns, got {list(found.shape)}")
        self.router.import_state({**tensors, "counts": torch.tensor(counts, dtype=torch.int64)}, values)
