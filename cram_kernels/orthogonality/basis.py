"""orthonormal_basis: of given columns, or an existing basis extended by a new expert's columns.

Extending costs O(D m k) for k new columns beside m held ones: Gram-Schmidt against the held basis, twice
("twice is enough"), a singular value decomposition of what remains, and once more against the held basis
because a small remainder carries its rounding enlarged. Work is done in float64; the result is stored
column by column.
"""

from __future__ import annotations

import torch
from torch import Tensor


def orthonormal_basis(columns: Tensor, basis: Tensor | None = None) -> Tensor:
    """Return an orthonormal basis of the span of `columns`, or of `basis` and `columns`, rank-revealing.

    Columns are brought to length 1 first, so a small expert counts as much as a large one; singular
    directions below max(D, m) * eps times the largest are dropped, eps of the result's dtype, m the number of
    held and new columns. With `basis`, its columns are the first of the result, unchanged, and only what
    `columns` add is computed: adding an expert never works on the older ones again.

    Args:
        columns: [D, k], any floating dtype; k = 0 is legal.
        basis: An earlier result [D, m'] to extend, or None.

    Returns:
        Q [D, m] with Q^T Q = I and m <= D, in `columns`' dtype (float32 for half precision), detached; its
        columns lie one after another in memory.

    Raises:
        ValueError: `columns` is not a matrix, or `basis` does not have as many rows.
    """
    if columns.dim() != 2:
        raise ValueError(f"columns must be [D, k], got {list(columns.shape)}")
    if basis is not None and (basis.dim() != 2 or basis.shape[0] != columns.shape[0]):
        raise ValueError(f"basis must be [{columns.shape[0]}, m], got {list(basis.shape)}")
    dtype = torch.promote_types(columns.dtype, torch.float32)
    held = columns.new_zeros(columns.shape[0], 0) if basis is None else basis.detach()
    new = _directions(columns.detach().double(), held.double(), torch.finfo(dtype).eps)
    return torch.cat([held.t().to(dtype), new.t().to(dtype)]).t()


def _directions(columns: Tensor, held: Tensor, eps: float) -> Tensor:
    """Orthonormal directions that `columns` add to `held`, strongest first."""
    norms = columns.norm(dim=0)
    unit = columns[:, norms > 0] / norms[norms > 0]
    if not unit.numel() or held.shape[1] >= held.shape[0]:
        return columns.new_zeros(columns.shape[0], 0)
    remainder = _without(_without(unit, held), held)
    directions, values, _ = torch.linalg.svd(remainder, full_matrices=False)
    # Columns have length 1: beside a held basis the largest singular value of everything is at least 1.
    largest = values[0].clamp(min=1.0) if held.shape[1] else values[0]
    floor = max(columns.shape[0], held.shape[1] + columns.shape[1]) * eps * largest
    kept = directions[:, values > floor][:, : held.shape[0] - held.shape[1]]
    return torch.linalg.qr(_without(kept, held))[0] if held.shape[1] else kept


def _without(columns: Tensor, held: Tensor) -> Tensor:
    return columns - held @ (held.t() @ columns)
