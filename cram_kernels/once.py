"""Backward passes that have no derivative of their own: whoever asks for one gets an error, never zero.

`torch.autograd.function.once_differentiable` raises where a derivative flows through everything. Where it is
asked for with respect to some tensors alone, as `torch.autograd.functional` does, it is None or zero there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]


def once_differentiable(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Make the second derivative of a `torch.autograd.Function` an error, by every tensor that it depends on.

    These are the incoming gradients and the saved inputs.
    """

    @wraps(backward)
    def checked(ctx: Any, *grads: Tensor | None) -> Gradients:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return backward(ctx, *grads)
        with torch.no_grad():
            found = backward(ctx, *grads)
        sources = [each for each in (*grads, *ctx.saved_tensors) if each is not None and each.requires_grad]
        if not sources:
            return found
        places = [i for i, each in enumerate(found) if each is not None]
        ends = _End.apply(len(places), *(found[i] for i in places), *sources)
        end_of = dict(zip(places, ends, strict=True))
        return tuple(end_of.get(i) for i in range(len(found)))

    return checked


class _End(torch.autograd.Function):
    """The first `count` tensors, as results of all of them that cannot be differentiated."""

    @staticmethod
    def forward(count: int, *tensors: Tensor) -> Gradients:
        return tuple(each.clone() for each in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Gradients) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> None:
        no_second_derivative(ctx)


def no_second_derivative(ctx: Any, *grads: Any) -> None:
    """Raise RuntimeError."""
    raise RuntimeError(
        "the kernels of cram_kernels must be differentiated once, got a second derivative; "
        "expert_lora and orthogonality_penalty have one with impl='reference'"
    )
