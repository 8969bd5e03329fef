"""orthogonality_penalty in one native call for all modules, forward and gradient together.

The loss is a scalar, so its gradients are known in the forward up to one factor: the operation returns them
flat, module after module, and the backward multiplies by the gradient of the loss. With w_b = gamma_b / (B
M):

    P = H A^T    C = Bt Q    E = s P C    loss = sum over modules and b of w_b |E_b|^2
    G = 2 s w E    dP = G C^T    dC = P^T G
    dA = dP^T H    dBt = dC Q^T    dH = dP A    dgamma_b = |E_b|^2 / (B M)

Saved: the wanted gradients, nothing else. Bytes: H, A and Q twice, Bt once, the gradients once; 2 r k D_out
multiply-adds a module dominate. Kernels: csrc/orthogonality.cpp and csrc/orthogonality.cu.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cram_kernels.dispatch import constant_when_compiled
from cram_kernels.native import DTYPES, native_missing

NAME = "cram::orthogonality_penalty"


def missing(device: torch.device | None, dtype: torch.dtype | None) -> str | None:
    """Return why the operation cannot serve such tensors, or None; then it is ready to be called."""
    reason = native_missing(device, dtype)
    if reason is None:
        _register()
    return reason


@constant_when_compiled
def _register() -> None:
    _register_once()


@cache
def _register_once() -> None:
    torch.library.register_fake(NAME, _fake)


def orthogonality_penalty(
    hidden: Sequence[Tensor],
    trained_a: Sequence[Tensor],
    trained_b: Sequence[Tensor],
    bases: Sequence[Tensor],
    gamma: Sequence[Tensor],
    mask: Tensor | None,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """Compute the penalty; arguments as in `cram_kernels.orthogonality_penalty`, checked; dtype float32."""
    bases = [basis if basis.dtype in DTYPES else basis.to(dtype) for basis in bases]
    weights = torch.cat(list(gamma)).to(dtype)
    return _Penalty.apply(scale, mask, weights, *hidden, *trained_a, *trained_b, *bases)


class _Penalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scale: float, mask: Tensor | None, gamma: Tensor, *tensors: Tensor) -> Tensor:
        count = len(tensors) // 4
        lists = [list(tensors[i * count : (i + 1) * count]) for i in range(4)]
        needs = ctx.needs_input_grad[3:]
        wanted = [any(needs[i * count : (i + 1) * count]) for i in range(3)]
        loss, *gradients = torch.ops.cram.orthogonality_penalty(
            *lists, gamma, mask, scale, *wanted, ctx.needs_input_grad[2]
        )
        ctx.save_for_backward(mask, *gradients)
        ctx.like = [[(t.shape, t.dtype) for t in lists[i]] if wanted[i] else [] for i in range(3)]
        ctx.count = count
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "orthogonality_penalty must not be differentiated twice under impl='native', got a backward "
                "with create_graph=True; impl='cpu' and impl='reference' have second derivatives"
            )
        mask, *gradients = ctx.saved_tensors
        found: list[Tensor | None] = []
        for flat, like in zip(gradients, ctx.like, strict=False):
            found += _split(flat * grad, like, mask) if like else [None] * ctx.count
            mask = None
        gamma = gradients[3] * grad if ctx.needs_input_grad[2] else None
        return None, None, gamma, *found, *[None] * ctx.count


def _split(flat: Tensor, like: Sequence[tuple[torch.Size, torch.dtype]], mask: Tensor | None) -> list[Tensor]:
    """Cut a flat gradient into the inputs' shapes; a pooled one is spread over the tokens of the mask."""
    shapes = [shape if mask is None else (shape[0], shape[2]) for shape, _ in like]
    pieces = flat.split([rows * columns for rows, columns in shapes])
    parts = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
    if mask is not None:
        share = mask / mask.sum(1, keepdim=True).clamp(min=1)
        parts = [share[:, :, None] * part[:, None, :] for part in parts]
    return [p if p.dtype == dtype else p.to(dtype) for p, (_, dtype) in zip(parts, like, strict=True)]


def _fake(
    hidden: list[Tensor],
    a: list[Tensor],
    bt: list[Tensor],
    bases: list[Tensor],
    gamma: Tensor,
    mask: Tensor | None,
    scale: float,
    *wanted: bool,
) -> tuple[Tensor, ...]:
    inputs = [h.shape[0] * h.shape[-1] for h in hidden]
    sizes = (sum(inputs), sum(t.numel() for t in a), sum(t.numel() for t in bt), gamma.numel())
    flat = [gamma.new_empty(size if want else 0) for size, want in zip(sizes, wanted, strict=True)]
    return gamma.new_empty(()), *flat
