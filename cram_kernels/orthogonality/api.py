"""Public orthogonality_penalty: checks, the modules that count, the choice of implementation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cram_kernels.dispatch import Op
from cram_kernels.orthogonality import cpu, native, reference
from cram_kernels.orthogonality.pooling import visual_mean

OP = Op(
    "orthogonality_penalty",
    {
        "reference": reference.orthogonality_penalty,
        "cpu": cpu.orthogonality_penalty,
        "native": native.orthogonality_penalty,
    },
    {"native": native.missing},
    tangents=("cpu", "reference"),
)


def orthogonality_penalty(
    hidden: Sequence[Tensor],
    trained_a: Sequence[Tensor],
    trained_b: Sequence[Tensor],
    bases: Sequence[Tensor],
    gamma: Sequence[Tensor] | Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Penalise what the trained experts write into the span of the old ones, over all modules.

        mean over modules with history of mean_b gamma[b] * | Q^T (scale * B A h_b) |^2

    Gradients flow to `trained_a`, `trained_b`, `gamma`, and to `hidden` where it requires grad. Everything is
    computed in float32 (float64 if a hidden state or trained factor is float64), whatever the autocast state.

    Args:
        hidden: Mean visual input of each module [B, D_in_m]; with `mask` its input tokens [B, T, D_in_m],
            whose mean the operation takes (a sample without visual tokens counts 0).
        trained_a: Down projections [r_m, D_in_m].
        trained_b: Transposed up projections [r_m, D_out_m], as in `PackedExperts.trained_b`.
        bases: Orthonormal bases [D_out_m, k_m] of the old experts' outputs; k_m = 0 marks a module without
            history, which does not count in the mean. Read in place where the columns lie one after another
            (as `orthonormal_basis` returns them), else "native" copies them in each call.
        gamma: Weight of each sample [B] in each module; one tensor [M, B] costs least.
        scale: LoRA scale.
        mask: Visual-token positions [B, T] (bool), the same for all modules, or None if `hidden` are means.
        impl: "auto" ("native" where it is installed, unless a float64 comes in; else "cpu"), "reference",
            "cpu" or "native".

    Returns:
        Scalar; a plain zero if no module has history. The mean over no samples counts 0.

    Raises:
        ValueError: Lists, shapes or devices do not fit together, a dtype is not floating point, or `impl` is
            unknown.
        NotImplementedError: `impl` is known but this op does not have it, or it cannot serve these tensors.

    Source: CRAM (arXiv 2606.02502), orthogonality regularisation of the new expert.
    """
    lists = (hidden, trained_a, trained_b, bases, gamma)
    device = _checked(hidden, lists, mask)
    dtype = torch.float32
    for found in {tensor.dtype for tensor in (*hidden, *trained_a, *trained_b)}:
        dtype = torch.promote_types(dtype, found)
    compute = OP.select(impl, device, dtype)
    counted = [m for m, basis in enumerate(bases) if basis.shape[1]]
    chosen = [m for m in counted if len(hidden[m])]
    if not chosen:
        return torch.zeros((), dtype=dtype, device=device)
    # A mean over no samples is 0 in every implementation; its module counts.
    scale = scale * (len(chosen) / len(counted)) ** 0.5
    if len(chosen) < len(hidden):
        hidden, trained_a, trained_b, bases, gamma = ([each[m] for m in chosen] for each in lists)
    if mask is not None and not mask.shape[1]:
        hidden, mask = [visual_mean(tokens, mask) for tokens in hidden], None
    with torch.autocast(device.type, enabled=False):
        return compute(hidden, trained_a, trained_b, bases, gamma, mask, scale, dtype)


def _checked(
    hidden: Sequence[Tensor], lists: Sequence[Sequence[Tensor] | Tensor], mask: Tensor | None
) -> torch.device:
    """Return the device; raise ValueError where the five lists do not fit together."""
    if isinstance(gamma := lists[-1], Tensor) and not gamma.dim():
        raise ValueError(f"gamma must be [M, B] or a list of [B], got {list(gamma.shape)}")
    if len({len(each) for each in lists}) != 1:
        raise ValueError(f"the five lists must be equally long, got {[len(each) for each in lists]}")
    _check_mask(hidden, mask)
    for shapes in dict.fromkeys(zip(*map(_shapes, lists), strict=True)):
        _check_module(shapes, masked=mask is not None)
    device = hidden[0].device if len(hidden) else torch.device("cpu")
    _check_places(device, lists, mask)
    return device


def _shapes(tensors: Sequence[Tensor] | Tensor) -> list[torch.Size]:
    return [tensors.shape[1:]] * len(tensors) if isinstance(tensors, Tensor) else [t.shape for t in tensors]


def _check_places(
    device: torch.device, lists: Sequence[Sequence[Tensor] | Tensor], mask: Tensor | None
) -> None:
    """Raise ValueError where a tensor lies elsewhere or is not floating point."""
    names = ("hidden", "trained_a", "trained_b", "bases", "gamma")
    for name, each in zip(names, lists, strict=True):
        found = {(t.device, t.dtype) for t in ((each,) if isinstance(each, Tensor) else each)}
        for place, dtype in found:
            if place != device or not dtype.is_floating_point:
                raise ValueError(f"{name} must be floating point on {device}, got {dtype} on {place}")
    if mask is not None and mask.device != device:
        raise ValueError(f"mask must be on {device}, got {mask.device}")


def _check_mask(hidden: Sequence[Tensor], mask: Tensor | None) -> None:
    if mask is None:
        return
    if mask.dim() != 2 or mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool [B, T], got {mask.dtype} {list(mask.shape)}")
    for tokens in hidden:
        if tokens.shape[:2] != mask.shape:
            raise ValueError(
                f"hidden must be [B, T, D_in] with B and T of the mask {list(mask.shape)}, "
                f"got {list(tokens.shape)}"
            )


def _check_module(shapes: tuple[torch.Size, ...], masked: bool) -> None:
    if tuple(map(len, shapes)) != (2 + masked, 2, 2, 2, 1):
        raise ValueError(
            "hidden, trained_a, trained_b, bases and gamma must be "
            f"{'[B, T, D_in]' if masked else '[B, D_in]'}, [r, D_in], [r, D_out], [D_out, k] and [B], "
            f"got {[list(shape) for shape in shapes]}"
        )
    (batch, *_, d_in), of_a, of_bt, (d_out, _), (samples,) = shapes
    found = ((batch, d_in), of_a, of_bt)
    expected = ((samples, of_a[1]), (of_bt[0], d_in), (of_a[0], d_out))
    if found != expected:
        raise ValueError(
            "hidden, trained_a and trained_b must fit gamma, each other and the basis: "
            f"{[list(e) for e in expected]}, got {[list(f) for f in found]}"
        )
