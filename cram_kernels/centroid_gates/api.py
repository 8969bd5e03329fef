"""Public centroid_gates: checks and the autograd Function around an implementation's forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cram_kernels.centroid_gates import reference
from cram_kernels.dispatch import Op

OP = Op("centroid_gates", {"reference": reference.centroid_gates})


def centroid_gates(
    query: Tensor,
    centroids: Tensor,
    sigma: float,
    members: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """Compute all layers' expert weights from one query per sample.

        gates[l, s, :] = softmax over the members e of -|query_s - centroids_le|^2 / (2 sigma^2)

    The gradient reaches `centroids` and `query` by a closed form. Backward reads no autograd-saved tensor, so
    ONE gates tensor may feed many reentrant-checkpointed layers, each of which back-propagates through it in
    its own backward pass. What produced `centroids` is passed as often and must not need saved tensors either
    (cat, stack, views and dtype casts do not). In return query, centroids and gates must not change in place
    before the last of them: that raises.

    Args:
        query: [S, D_q], floating point.
        centroids: [L, E, D_q], may require grad.
        sigma: Width, larger than 0.
        members: bool [S, E], the experts sample s may use; None for all. Others get exactly 0, and a row
            without any member is all zeros.
        impl: "auto", "reference", "cpu", "triton" or "native".

    Returns:
        Gates [L, S, E] in float32 (float64 if an input is float64), whatever the autocast state.

    Raises:
        ValueError: Shapes or dtypes do not fit, `sigma` is not positive, or `impl` is unknown.
        NotImplementedError: `impl` is known but this op does not have it.

    Source: CRAM (arXiv 2606.02502), centroid routing inside an instruction group.
    """
    forward = OP.select(impl, query.device)
    _check(query, centroids, sigma, members)
    dtype = torch.promote_types(torch.promote_types(query.dtype, centroids.dtype), torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        return _CentroidGates.apply(query.to(dtype), centroids.to(dtype), sigma, members, forward)


class _CentroidGates(torch.autograd.Function):
    """Keeps what backward needs as plain attributes, which outlive the release of a graph's saved tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        centroids: Tensor,
        sigma: float,
        members: Tensor | None,
        gates_of: Callable[[Tensor, Tensor, float, Tensor | None], Tensor],
    ) -> Tensor:
        gates = gates_of(query, centroids, sigma, members)
        ctx.query, ctx.centroids, ctx.sigma, ctx.members = query.detach(), centroids.detach(), sigma, members
        # An alias, because the output itself would tie a reference cycle through its grad_fn.
        ctx.gates = gates.detach()
        ctx.versions = _versions(ctx.query, ctx.centroids, ctx.gates)
        return gates

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.versions != _versions(ctx.query, ctx.centroids, ctx.gates):
            raise RuntimeError(
                "query, centroids and gates must not change in place between forward and backward"
            )
        with torch.autocast(grad.device.type, enabled=False):
            grads = reference.centroid_gates_backward(
                grad, ctx.gates, ctx.query, ctx.centroids, ctx.sigma, ctx.members
            )
        return (*grads, None, None, None)


def _versions(*tensors: Tensor) -> tuple[int, ...]:
    """Return the tensors' in-place counters; none under the compiler, which cannot read them."""
    return () if torch.compiler.is_compiling() else tuple(tensor._version for tensor in tensors)


def _check(query: Tensor, centroids: Tensor, sigma: float, members: Tensor | None) -> None:
    if query.dim() != 2 or centroids.dim() != 3 or query.shape[1] != centroids.shape[2]:
        raise ValueError(
            "query and centroids must be [S, D_q] and [L, E, D_q], "
            f"got {list(query.shape)} and {list(centroids.shape)}"
        )
    if not (query.is_floating_point() and centroids.is_floating_point()):
        raise ValueError(
            f"query and centroids must be floating point, got {query.dtype} and {centroids.dtype}"
        )
    if not sigma > 0:
        raise ValueError(f"sigma must be positive, got {sigma}")
    if members is not None:
        wanted = (query.shape[0], centroids.shape[1])
        if members.shape != wanted or members.dtype != torch.bool:
            raise ValueError(
                f"members must be bool {list(wanted)}, got {members.dtype} {list(members.shape)}"
            )
