"""centroid_gates on Triton kernels, as two functional operations that the compiler sees whole.

`cram::centroid_gates` and `cram::centroid_gates_backward` carry no autograd formula: the Function in api.py
is the one road to them. They are defined on `torch.library.Library` itself, which adds less than a third of
what `custom_op` adds to a call's host time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cram_kernels.centroid_gates.kernels import (
    centroid_gradient_launch,
    forward_launch,
    query_gradient_launch,
)
from cram_kernels.launch import on_device_of

_LIBRARY = torch.library.Library("cram", "FRAGMENT")
_LIBRARY.define(
    "centroid_gates(Tensor query, Tensor centroids, float sigma, Tensor? members) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "centroid_gates_backward(Tensor grad, Tensor gates, Tensor query, Tensor centroids, float sigma, "
    "int trained, bool need_query, bool need_centroids) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _rows_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _empty_gates(query: Tensor, centroids: Tensor, sigma: float, members: Tensor | None) -> Tensor:
    return query.new_empty(centroids.shape[0], query.shape[0], centroids.shape[1])


def _empty_gradients(
    grad: Tensor,
    gates: Tensor,
    query: Tensor,
    centroids: Tensor,
    sigma: float,
    trained: int,
    need_query: bool,
    need_centroids: bool,
) -> tuple[Tensor, Tensor]:
    """A gradient that is not needed has no elements."""
    return (
        query.new_empty(query.shape if need_query else 0),
        centroids.new_empty(centroids.shape if need_centroids else 0),
    )


def _run_forward(query: Tensor, centroids: Tensor, sigma: float, members: Tensor | None) -> Tensor:
    gates = _empty_gates(query, centroids, sigma, members)
    chosen = None if members is None else _rows_contiguous(members).view(torch.uint8)
    with on_device_of(query):
        forward_launch(_rows_contiguous(query), _rows_contiguous(centroids), sigma, chosen, gates).run()
    return gates


def _run_backward(
    grad: Tensor,
    gates: Tensor,
    query: Tensor,
    centroids: Tensor,
    sigma: float,
    trained: int,
    need_query: bool,
    need_centroids: bool,
) -> tuple[Tensor, Tensor]:
    dquery, dcentroids = _empty_gradients(
        grad, gates, query, centroids, sigma, trained, need_query, need_centroids
    )
    inputs = (
        grad.contiguous(),
        gates.contiguous(),
        _rows_contiguous(query),
        _rows_contiguous(centroids),
        sigma,
    )
    with on_device_of(query):
        if need_centroids:
            centroid_gradient_launch(*inputs, trained, dcentroids).run()
        if need_query:
            query_gradient_launch(*inputs, dquery).run()
    return dquery, dcentroids


for _name, _run, _fake in (
    ("centroid_gates", _run_forward, _empty_gates),
    ("centroid_gates_backward", _run_backward, _empty_gradients),
):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"cram::{_name}", _fake, lib=_LIBRARY)


def centroid_gates(query: Tensor, centroids: Tensor, sigma: float, members: Tensor | None) -> Tensor:
    """Compute gates [L, S, E]; arguments as in `cram_kernels.centroid_gates`, checked, float32."""
    return torch.ops.cram.centroid_gates.default(query, centroids, sigma, members)


def centroid_gates_backward(
    grad: Tensor,
    gates: Tensor,
    query: Tensor,
    centroids: Tensor,
    sigma: float,
    members: Tensor | None,
    trained: int,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of query [S, D_q] and centroids [L, E, D_q], None where `needs` says no.

    `members` is not read: gates outside are exactly 0.
    """
    found = torch.ops.cram.centroid_gates_backward.default(
        grad, gates, query, centroids, sigma, trained, *needs
    )
    dquery, dcentroids = (value if need else None for value, need in zip(found, needs, strict=True))
    return dquery, dcentroids
