"""Public orthogonality_penalty and orthonormal_basis."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cram_kernels.dispatch import Op
from cram_kernels.orthogonality import cpu, reference

OP = Op(
    "orthogonality_penalty",
    {"reference": reference.orthogonality_penalty, "cpu": cpu.orthogonality_penalty},
)


def orthogonality_penalty(
    hidden: Sequence[Tensor],
    trained_a: Sequence[Tensor],
    trained_b: Sequence[Tensor],
    bases: Sequence[Tensor],
    gamma: Sequence[Tensor],
    *,
    scale: float,
    impl: str = "auto",
) -> Tensor:
    """Penalise what the trained experts write into the span of the old ones, over all modules.

        mean over modules with history of mean_b gamma[b] * | Q^T (scale * B A h_b) |^2

    Gradients flow to `trained_a`, `trained_b`, `gamma`, and to `hidden` where it requires grad. Everything is
    computed in float32 (float64 if a hidden state or trained factor is float64), whatever the autocast state.

    Args:
        hidden: Mean visual input of each module [B, D_in_m].
        trained_a: Down projections [r_m, D_in_m].
        trained_b: Transposed up projections [r_m, D_out_m], as in `PackedExperts.trained_b`.
        bases: Orthonormal bases [D_out_m, k_m] of the old experts' outputs; k_m = 0 marks a module without
            history, which does not count in the mean.
        gamma: Weight of each sample [B] in each module.
        scale: LoRA scale.
        impl: "auto" ("cpu" for CPU tensors, else "reference"), "reference", "cpu", "triton" or "native".

    Returns:
        Scalar; a plain zero if no module has history.

    Raises:
        ValueError: Lists or shapes do not fit together, or `impl` is unknown.
        NotImplementedError: `impl` is known but this op does not have it.

    Source: CRAM (arXiv 2606.02502), orthogonality regularisation of the new expert.
    """
    lists = (hidden, trained_a, trained_b, bases, gamma)
    if len({len(each) for each in lists}) != 1:
        raise ValueError(f"the five lists must be equally long, got {[len(each) for each in lists]}")
    for module in zip(*lists, strict=True):
        _check_module(*module)
    device = hidden[0].device if hidden else torch.device("cpu")
    compute = OP.select(impl, device)
    chosen = [m for m, basis in enumerate(bases) if basis.shape[1]]
    dtype = torch.float32
    for tensor in (*hidden, *trained_a, *trained_b):
        dtype = torch.promote_types(dtype, tensor.dtype)
    if not chosen:
        return torch.zeros((), dtype=dtype, device=device)
    with torch.autocast(device.type, enabled=False):
        return compute(*([each[m] for m in chosen] for each in lists), scale, dtype)


def orthonormal_basis(columns: Tensor) -> Tensor:
    """Return an orthonormal basis of the span of `columns`, without their dependent directions.

    Columns are brought to length 1 first, so a small expert counts as much as a large one; singular
    directions below max(D, k) * eps times the largest are dropped, eps of the result's dtype.

    Args:
        columns: [D, k], any floating dtype; k = 0 is legal.

    Returns:
        Q [D, m] with Q^T Q = I and m <= min(D, k), in `columns`' dtype (float32 for half precision),
        detached.

    Raises:
        ValueError: `columns` is not a matrix.
    """
    if columns.dim() != 2:
        raise ValueError(f"columns must be [D, k], got {list(columns.shape)}")
    dtype = torch.promote_types(columns.dtype, torch.float32)
    wide = columns.detach().double()
    norms = wide.norm(dim=0)
    wide = wide[:, norms > 0] / norms[norms > 0]
    if not wide.numel():
        return columns.new_zeros(columns.shape[0], 0, dtype=dtype)
    directions, values, _ = torch.linalg.svd(wide, full_matrices=False)
    floor = max(columns.shape) * torch.finfo(dtype).eps * values[0]
    return directions[:, values > floor].to(dtype).contiguous()


def _check_module(hidden: Tensor, a: Tensor, bt: Tensor, basis: Tensor, gamma: Tensor) -> None:
    if any(tensor.dim() != 2 for tensor in (hidden, a, bt, basis)) or gamma.dim() != 1:
        raise ValueError(
            "hidden, trained_a, trained_b, bases and gamma must be [B, D_in], [r, D_in], [r, D_out], "
            f"[D_out, k] and [B], got {[list(t.shape) for t in (hidden, a, bt, basis, gamma)]}"
        )
    expected = ((gamma.shape[0], a.shape[1]), (bt.shape[0], hidden.shape[1]), (a.shape[0], basis.shape[0]))
    if (hidden.shape, a.shape, bt.shape) != expected:
        raise ValueError(
            "hidden, trained_a and trained_b must fit gamma, each other and the basis: "
            f"{[list(e) for e in expected]}, got {[list(t.shape) for t in (hidden, a, bt)]}"
        )
