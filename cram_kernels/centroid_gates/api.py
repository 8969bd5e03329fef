"""Public centroid_gates: checks and the autograd Function around an implementation's forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cram_kernels.centroid_gates import native, reference
from cram_kernels.dispatch import Op, check_devices, in_forward_mode, triton_missing, without_autocast
from cram_kernels.once import once_differentiable

# (query, centroids, sigma, members) -> gates
Forward = Callable[[Tensor, Tensor, float, Tensor | None], Tensor]
# (grad, gates, query, centroids, sigma, members, trained, needs) -> gradients of query and centroids
Backward = Callable[..., tuple[Tensor | None, Tensor | None]]


def centroid_gates(
    query: Tensor,
    centroids: Tensor,
    sigma: float,
    members: Tensor | None = None,
    *,
    trained: int | None = None,
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
        trained: Only the last so many experts of `centroids` get gradients, those before them zeros; None for
            all. The gradient of `query` takes in all experts either way.
        impl: "auto" (on a CUDA device "triton", on a CPU "native" in float32, else "reference"),
            "reference", "triton" or "native".

    Returns:
        Gates [L, S, E] in float32 (float64 if an input is float64), whatever the autocast state.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit, `sigma` is not positive, `trained` is not between 0
            and E, or `impl` is unknown.
        NotImplementedError: `impl` is known but this op does not have it, or it cannot serve these tensors.

    Source: CRAM (arXiv 2606.02502), centroid routing inside an instruction group.
    """
    check_router(query, centroids, sigma, members, trained)
    dtype = torch.promote_types(torch.promote_types(query.dtype, centroids.dtype), torch.float32)
    gates_of = OP.select(impl, query.device, dtype)
    rows = centroids.shape[1] if trained is None else trained
    with without_autocast(query.device.type):
        return gates_of(query.to(dtype), centroids.to(dtype), sigma, members, rows)


class _CentroidGates(torch.autograd.Function):
    """Keeps what backward needs as plain attributes, which outlive the release of a graph's saved tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        centroids: Tensor,
        sigma: float,
        members: Tensor | None,
        trained: int,
        forward: Forward,
        backward: Backward,
    ) -> Tensor:
        gates = forward(query, centroids, sigma, members)
        ctx.query, ctx.centroids, ctx.sigma, ctx.members = query.detach(), centroids.detach(), sigma, members
        # An alias, because the output itself would tie a reference cycle through its grad_fn.
        ctx.gates = gates.detach()
        ctx.versions = _versions(ctx.query, ctx.centroids, ctx.gates)
        ctx.trained, ctx.gradients_of = trained, backward
        # What a second derivative would be asked for by, which is refused.
        ctx.save_for_backward(*(each for each in (query, centroids) if each.requires_grad))
        return gates

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.versions != _versions(ctx.query, ctx.centroids, ctx.gates):
            raise RuntimeError(
                "query, centroids and gates must not change in place between forward and backward"
            )
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        with without_autocast(grad.device.type):
            dquery, dcentroids = ctx.gradients_of(
                grad, ctx.gates, ctx.query, ctx.centroids, ctx.sigma, ctx.members, ctx.trained, needs
            )
        return dquery, dcentroids, None, None, None, None, None


def _versions(*tensors: Tensor) -> tuple[int, ...]:
    """Return the tensors' in-place counters; none under the compiler, and none of inference tensors."""
    if torch.compiler.is_compiling():
        return ()
    return tuple(tensor._version for tensor in tensors if not tensor.is_inference())


def _differentiable(
    forward: Forward,
    backward: Backward,
    query: Tensor,
    centroids: Tensor,
    sigma: float,
    members: Tensor | None,
    trained: int,
) -> Tensor:
    needs = torch.is_grad_enabled() and (query.requires_grad or centroids.requires_grad)
    # Forward mode, which comes here with the reference alone, passes through its plain operations.
    if not needs or in_forward_mode():
        return forward(query, centroids, sigma, members)
    return _CentroidGates.apply(query, centroids, sigma, members, trained, forward, backward)


def _triton_forward(*arguments: Any) -> Tensor:
    from cram_kernels.centroid_gates import triton

    return triton.centroid_gates(*arguments)


def _triton_backward(*arguments: Any) -> tuple[Tensor | None, Tensor | None]:
    from cram_kernels.centroid_gates import triton

    return triton.centroid_gates_backward(*arguments)


OP = Op(
    "centroid_gates",
    {
        "reference": partial(_differentiable, reference.centroid_gates, reference.centroid_gates_backward),
        "triton": partial(_differentiable, _triton_forward, _triton_backward),
        "native": partial(_differentiable, native.centroid_gates, reference.centroid_gates_backward),
    },
    {"triton": triton_missing, "native": native.missing},
)


def check_router(
    query: Tensor, centroids: Tensor, sigma: float, members: Tensor | None, trained: int | None = None
) -> None:
    """Raise ValueError where the arguments of `centroid_gates` do not fit together."""
    check_devices(query.device, centroids=centroids, members=members)
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
    if trained is not None and not 0 <= trained <= centroids.shape[1]:
        raise ValueError(f"trained must be between 0 and E={centroids.shape[1]}, got {trained}")
