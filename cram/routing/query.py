"""What routing reads and what it decides: the query of some samples, their route, and who is asked for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Query:
    """Frozen features of S samples; gradients never flow into them.

    Attributes:
        text: [S, D_t] text features.
        image: [S, D_q] image features; rows without an image are ignored, whatever they hold.
        has_image: [S] bool.

    Raises:
        ValueError: if the shapes or dtypes do not fit together.
    """

    text: Tensor
    image: Tensor
    has_image: Tensor

    def __post_init__(self) -> None:
        samples = self.text.shape[0] if self.text.dim() == 2 else -1
        if samples < 1 or self.image.dim() != 2 or self.image.shape[0] != samples:
            raise ValueError(
                f"text and image must be [S, D_t] and [S, D_q], "
                f"got {list(self.text.shape)} and {list(self.image.shape)}"
            )
        if self.has_image.shape != (samples,) or self.has_image.dtype != torch.bool:
            raise ValueError(
                f"has_image must be bool [{samples}], got {self.has_image.dtype} {list(self.has_image.shape)}"
            )
        image = self.image.detach().float().masked_fill(~self.has_image[:, None], 0.0)
        object.__setattr__(self, "image", image)
        object.__setattr__(self, "text", self.text.detach().float())

    def __len__(self) -> int:
        return self.text.shape[0]

    def batch_mean(self) -> Query:
        """Every sample replaced by the mean text and the mean over the images (released code)."""
        images = self.has_image.sum().clamp(min=1)
        return Query(
            text=self.text.mean(0, keepdim=True).expand_as(self.text),
            image=(self.image.sum(0, keepdim=True) / images).expand_as(self.image),
            has_image=self.has_image.any().expand_as(self.has_image),
        )


@dataclass(frozen=True)
class Route:
    """How the experts act on S samples.

    Attributes:
        gates: [L, S, E] float32; in CRAM zero outside the sample's group. S = 1 serves all rows.
        groups: [S] int64, the samples' instruction groups; None where the method has none.
        query: What the gates were made from, where they were made from a query.
        features: [S, F], whatever the method wants its linears to see, or None.
        memory: What `ForwardState.once` holds from the start; a prefill works on a copy.
        overrides_gating: Whether the gates are used as they are; else a linear's own gating or its solo
            experts may act instead.
    """

    gates: Tensor
    groups: Tensor | None = None
    query: Query | None = None
    features: Tensor | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)
    overrides_gating: bool = False


def same_route(one: Route, other: Route, rounding: float = 0.0) -> bool:
    """Whether two routes have gates and features that are equal up to `rounding`."""
    if one.gates.shape != other.gates.shape:
        return False
    gates = torch.allclose(one.gates, other.gates, rtol=0.0, atol=rounding)
    if one.features is None or other.features is None:
        return gates and one.features is other.features
    return gates and torch.allclose(one.features, other.features, rtol=rounding, atol=rounding)


class Routes(Protocol):
    """The part of a method that a forward asks; `cram.methods.base.Method` has all of it."""

    uses_queries: bool

    @property
    def wants_visual_means(self) -> bool:
        """Whether the linears keep the visual-token means of their training inputs."""

    def route(self, query: Query | None, training: bool) -> Route:
        """The route of a prefill or training forward."""
