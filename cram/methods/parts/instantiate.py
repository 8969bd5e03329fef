"""Adaptive-rank instantiation: a task's warm-up buffer becomes an expert with its own rank in every module.

    s B_buf A_buf = U diag(S) V^T                          QR of both factors, SVD of the rank-sized core
    candidates {j : S_j > tau_alloc}, at most rank_max     the strongest one if none
    keep j with ||v_j - Q Q^T v_j|| > tau                  Q: rows of the group's older A; or the strongest
    fill by singular value up to rank_min                  appended, so rows are not sorted by S
    v_j <- normalise(v_j - Q Q^T v_j)                      unless nothing is left of v_j
    B = U sqrt(S'),  A = sqrt(S') V^T

tau is ``tau_orth``, the paper's 0.99 for layers of width 4096. With ``overlap_ratio`` = c it follows width
and history instead. A random unit vector in D_in dimensions has, on average, the share m / D_in of its
squared length inside a space of m dimensions. A direction is filtered if its share exceeds c times that:

    tau = sqrt(max(0, 1 - c m / D_in))                     c = 9 gives 0.99 at D_in = 4096 and m = 9

Only the first ``rank_max`` directions can be selected, so only these are expanded to D_out and D_in. No
matrix of size [D_out, D_in] is formed. S contains s. The faithful default divides s out: S' = S / s. The
released code leaves s in: S' = S. There the expert starts at twice the update, because the forward multiplies
by s again. Left out on purpose: re-orthogonalising the projected rows and shrinking S by the removed part
(the released code does neither).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cram.config import CramConfig
from cram.model.factors import Factors

_DEGENERATE = 1e-6  # a unit row with a smaller residual stays unprojected
_MIN_SINGULAR = 1e-12
_STACK = 32  # modules decomposed at once: bounds the stacked copies to about 25 MB each at D = 4096, rank 48


@dataclass(frozen=True)
class Instantiation:
    """The new expert of one module, with the reasons for its rank.

    Attributes:
        a: [r, D_in] float32.
        b: [D_out, r] float32.
        singular_values: Those of s B_buf A_buf, [min(r_buf, D_in, D_out)] float32 on the CPU, descending.
        selected: Indices into ``singular_values``, in the order of the rows of ``a``.
        novelty: Residual norms of the first ``rank_max`` directions. Without history each is 1.0.
    """

    a: Tensor
    b: Tensor
    singular_values: Tensor
    selected: tuple[int, ...]
    novelty: tuple[float, ...]

    @property
    def rank(self) -> int:
        """The number of rows of ``a``."""
        return len(self.selected)


def mean_novelty(made: Iterable[Instantiation]) -> float:
    """The mean novelty over all kept directions of all modules; 1.0 where nothing was kept."""
    kept = [module.novelty[index] for module in made for index in module.selected]
    return sum(kept) / len(kept) if kept else 1.0


@torch.no_grad()
def instantiate_modules(
    buffers: Mapping[str, Factors], history: Mapping[str, Sequence[Tensor]], config: CramConfig
) -> dict[str, Instantiation]:
    """Builds the new expert of every module, in float32 on the buffers' device.

    Args:
        buffers: module -> (a_buf [r_buf, D_in], b_buf [D_out, r_buf]).
        history: module -> A factors [r_k, D_in] of the same group's older experts. Absent or empty for the
            first task of a group. A rank of 0 is legal.
        config: Thresholds, ranks, scale, and ``released_code``, which keeps the scale inside the factors.

    Returns:
        One ``Instantiation`` per module, in the order of ``buffers``.

    Raises:
        ValueError: If shapes do not match, a value is NaN or Inf, or history names an unknown module.
    """
    if unknown := sorted(set(history) - set(buffers)):
        raise ValueError(f"history modules must be among the buffers' {sorted(buffers)}, got {unknown}")
    for name, (a, b) in buffers.items():
        _check(name, a, b, history.get(name, ()))
    made: dict[str, Instantiation] = {}
    for names in _stacks(buffers):
        with torch.autocast(buffers[names[0]][0].device.type, enabled=False):
            made.update(_instantiate_stack(names, buffers, history, config))
    return {name: made[name] for name in buffers}


def _check(name: str, a: Tensor, b: Tensor, older: Sequence[Tensor]) -> None:
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise ValueError(
            f"buffer of {name} must be [r, D_in] and [D_out, r], r at least 1, "
            f"got {list(a.shape)} and {list(b.shape)}"
        )
    if bad := [list(rows.shape) for rows in older if rows.dim() != 2 or rows.shape[1] != a.shape[1]]:
        raise ValueError(f"history of {name} must be [r_k, {a.shape[1]}], got {bad}")
    if not all(bool(tensor.isfinite().all()) for tensor in (a, b, *older)):
        raise ValueError(f"buffer and history of {name} must be finite, got NaN or Inf")


def _stacks(buffers: Mapping[str, Factors]) -> Iterator[list[str]]:
    """Module names of equal shapes and device, at most ``_STACK`` at a time."""
    same: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for name, (a, b) in buffers.items():
        same[(a.shape, b.shape, a.device)].append(name)
    for names in same.values():
        yield from (names[start : start + _STACK] for start in range(0, len(names), _STACK))


def _instantiate_stack(
    names: list[str],
    buffers: Mapping[str, Factors],
    history: Mapping[str, Sequence[Tensor]],
    config: CramConfig,
) -> Iterator[tuple[str, Instantiation]]:
    a = torch.stack([buffers[name][0].float() for name in names])
    b = torch.stack([buffers[name][1].float() for name in names])
    left, values, right = _thin_svd(a, b, config.scale, config.rank_max)
    empty = a.new_zeros(0, a.shape[2])
    old = [torch.cat([empty, *(rows.to(a) for rows in history.get(name, ()))]) for name in names]
    filtering = (config.tau_orth > 0 or config.overlap_ratio > 0) and any(len(rows) for rows in old)
    basis = _row_basis(old) if filtering else a.new_zeros(len(names), a.shape[2], 0)
    residual = _outside(right, basis)
    dimensions = (basis != 0).any(1).sum(1).tolist()
    norms = torch.linalg.vector_norm(residual, dim=1)
    unit = residual / norms.clamp(min=_DEGENERATE)[:, None]
    projected = torch.where((norms < _DEGENERATE)[:, None], right, unit)
    share = values.clamp(min=_MIN_SINGULAR) / (1.0 if config.released_code else config.scale)
    host_values, host_norms = values.cpu(), norms.cpu()
    for i, name in enumerate(names):
        filtered = filtering and len(old[i]) > 0
        novelty = tuple(host_norms[i].tolist()) if filtered else (1.0,) * right.shape[2]
        least = least_novelty(config, dimensions[i], a.shape[2])
        selected = _select(host_values[i].tolist(), novelty, least, config)
        kept = (projected if filtered else right)[i][:, list(selected)]
        root = share[i][list(selected)].sqrt()
        new_a, new_b = (kept * root).T.contiguous(), left[i][:, list(selected)] * root
        yield name, Instantiation(new_a, new_b, host_values[i], selected, novelty)


def _thin_svd(a: Tensor, b: Tensor, scale: float, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of scale * b @ a for stacks a [n, r, D_in], b [n, D_out, r].

    Returns:
        U [n, D_out, k], all singular values [n, p], V [n, D_in, k] with k = min(top, p).
    """
    basis_out, upper_out = torch.linalg.qr(b)
    basis_in, upper_in = torch.linalg.qr(a.mT)
    u, values, vh = torch.linalg.svd(scale * upper_out @ upper_in.mT, full_matrices=False)
    return basis_out @ u[:, :, :top], values, basis_in @ vh.mT[:, :, :top]


def _row_basis(old: list[Tensor]) -> Tensor:
    """Orthonormal bases [n, D_in, m] of the row spaces of ``old``; dependent directions are zero columns."""
    width = max(len(rows) for rows in old)
    padded = torch.stack([F.pad(rows, (0, 0, 0, width - len(rows))) for rows in old])
    norms = torch.linalg.vector_norm(padded, dim=2, keepdim=True)
    basis, upper = torch.linalg.qr((padded / norms.clamp(min=torch.finfo(padded.dtype).tiny)).mT)
    u, values, _ = torch.linalg.svd(upper, full_matrices=False)
    cutoff = values[:, :1] * max(basis.shape[1], width) * torch.finfo(basis.dtype).eps
    return basis @ (u * (values > cutoff)[:, None])


def _outside(directions: Tensor, basis: Tensor) -> Tensor:
    """The part of unit columns [n, D_in, k] orthogonal to the basis [n, D_in, m]."""
    return directions - basis @ (basis.mT @ directions)


def least_novelty(config: CramConfig, dimensions: int, width: int) -> float:
    """Return tau for a history of so many dimensions in a space of ``width``."""
    if not config.overlap_ratio:
        return config.tau_orth
    return max(0.0, 1 - config.overlap_ratio * dimensions / width) ** 0.5


def _select(
    values: list[float], novelty: Sequence[float], least: float, config: CramConfig
) -> tuple[int, ...]:
    """Indices of the kept directions. Order of the rules: threshold, cap, novelty filter, floor."""
    above = [j for j, value in enumerate(values[: config.rank_max]) if value > config.tau_alloc] or [0]
    kept = [j for j in above if novelty[j] > least] or above[:1]
    spare = [j for j in range(min(config.rank_max, len(values))) if j not in kept]
    return tuple(kept + spare[: max(0, config.rank_min - len(kept))])
