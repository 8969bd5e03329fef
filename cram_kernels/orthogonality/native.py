"""orthogonality_penalty in one native call for all modules, forward and gradient together.

The loss is a scalar, so its gradients are known in the forward up to one factor: the operation returns them
flat, module after module, and the backward multiplies by the gradient of the loss. With w_b = gamma_b / (B
M):

    P = H A^T    C = Bt Q    E = s P C    loss = sum over modules and b of w_b |E_b|^2
    G = 2 s w E    dP = G C^T    dC = P^T G
    dA = dP^T H    dBt = dC Q^T    dH = dP A    dgamma_b = |E_b|^2 / (B M)

Saved: the wanted gradients, nothing else. Bytes: H, A and Q twice, Bt once, the gradients once; 2 r k D_out
multiply-adds a module dominate. Kernels: csrc/orthogonality/cpu.cpp and cuda.cu.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import groupby
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cram_kernels.dispatch import check_one_device, constant_when_compiled
from cram_kernels.library import DTYPES, native_missing

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
    gamma: Sequence[Tensor] | Tensor,
    mask: Tensor | None,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """Compute the penalty; arguments as in `cram_kernels.orthogonality_penalty`, checked; dtype float32."""
    weights = (gamma.flatten() if isinstance(gamma, Tensor) else torch.cat(list(gamma))).to(dtype)
    bases = [basis if basis.dtype in DTYPES else basis.to(dtype) for basis in bases]
    inputs = hidden if any(each.requires_grad for each in hidden) else ()
    call = _Call(hidden, bases, mask, scale)
    return _Penalty.apply(call, weights, *trained_a, *trained_b, *inputs)


class _Call(NamedTuple):
    """What a call has beside the tensors whose gradients can be wanted."""

    hidden: Sequence[Tensor]
    bases: Sequence[Tensor]
    mask: Tensor | None
    scale: float


class _Penalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, gamma: Tensor, *tensors: Tensor) -> Tensor:
        count = len(call.hidden)
        lists = [list(tensors[i : i + count]) for i in range(0, len(tensors), count)]
        needs = ctx.needs_input_grad[2:]
        wanted = [any(needs[i : i + count]) for i in range(0, len(needs), count)]
        a, bt = lists[:2]
        hidden = lists[2] if len(lists) > 2 else list(call.hidden)
        loss, dhidden, *gradients = torch.ops.cram.orthogonality_penalty(
            hidden,
            a,
            bt,
            list(call.bases),
            gamma,
            call.mask,
            call.scale,
            len(lists) > 2 and wanted[2],
            *wanted[:2],
            ctx.needs_input_grad[1],
        )
        ctx.save_for_backward(call.mask, gradients[2], *gradients[:2], dhidden)
        ctx.runs = [_runs(each) if want else [] for each, want in zip(lists, wanted, strict=True)]
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
        # What no later backward reads is multiplied where it lies, unless by a batch of gradients.
        kept = torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph()
        kept = kept or _is_batch(grad)
        gamma, *flat = [each * grad if kept else each.mul_(grad) for each in gradients]
        found: list[Tensor | None] = []
        for i, runs in enumerate(ctx.runs):
            found += _cut(flat[i], runs, mask if i == 2 else None) if runs else [None] * ctx.count
        return None, gamma if ctx.needs_input_grad[1] else None, *found


def _is_batch(grad: Tensor) -> bool:
    """Whether a gradient stands for several (`is_grads_batched`)."""
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(grad) or functorch.is_batchedtensor(grad)


def _runs(tensors: Sequence[Tensor]) -> list[tuple[torch.Size, torch.dtype, int]]:
    """How many neighbours have the same shape and dtype, run after run."""
    return [(*key, len(list(run))) for key, run in groupby((t.shape, t.dtype) for t in tensors)]


def _cut(
    flat: Tensor, runs: Sequence[tuple[torch.Size, torch.dtype, int]], mask: Tensor | None
) -> list[Tensor]:
    """Cut a flat gradient into the inputs' shapes; a pooled one is spread over the tokens of the mask.

    A call a run, not one a tensor: each costs more than the values of a small module.
    """
    shapes = [shape if mask is None else (shape[0], shape[2]) for shape, *_ in runs]
    pieces = flat.split([count * prod(shape) for shape, (*_, count) in zip(shapes, runs, strict=True)])
    share = None if mask is None else mask / mask.sum(1, keepdim=True).clamp(min=1)
    found: list[Tensor] = []
    for piece, shape, (_, dtype, count) in zip(pieces, shapes, runs, strict=True):
        part = piece.view(count, *shape)
        if share is not None:
            part = share[:, :, None] * part[:, :, None, :]
        found += part.to(dtype).unbind(0)
    return found


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
    check_one_device(gamma, hidden, a, bt, bases, mask)
    inputs = [h.shape[0] * h.shape[-1] for h in hidden]
    sizes = (sum(inputs), sum(t.numel() for t in a), sum(t.numel() for t in bt), gamma.numel())
    flat = [gamma.new_empty(size if want else 0) for size, want in zip(sizes, wanted, strict=True)]
    return gamma.new_empty(()), *flat
