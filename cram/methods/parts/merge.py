"""Merging low-rank updates by regularised least squares, without data and without gradients (MAny's LPM).

The merged weight of tasks 1 .. t is the minimiser of

    sum_i ||(W - B_i A_i) A_i^T||_F^2 + rho ||W||_F^2

The rows of A_i are the inputs that task i reacts to. W should act on these rows as B_i A_i does. A recursion
finds W, in float64 on the CPU:

    R_t = R_{t-1} - R_{t-1} A_t^T (I + A_t R_{t-1} A_t^T)^-1 A_t R_{t-1}        R_0 = I / rho
    W_t = W_{t-1} + (B_t A_t - W_{t-1}) A_t^T A_t R_t                           W_0 = 0

No dense [D_out, D_in] or [D_in, D_in] matrix is formed. Let the rows of Q [k, D_in] be an orthonormal basis
of the rows of all A_i. Then W_t = Y Q, and R_t is I / rho outside the span of Q. So the recursion runs in the
coordinates of Q. The merged weight is one expert of rank k, and k is at most the sum of the ranks.

The same optimum in the coordinates of the A_i themselves is B (A A^T + rho I)^-1 A. That form is far worse
conditioned if rows of the A_i are nearly dependent. W is linear in the B_i: merging scale * B_i A_i gives
scale * W. So the merged expert keeps the scale of its parts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from cram.model.factors import Factors


@dataclass(frozen=True)
class MergedWeight:
    """The state of the recursion after a number of tasks, float64 on the CPU.

    Attributes:
        rho: Weight of the ridge term.
        basis: Q [k, D_in], orthonormal rows, k at most the sum of the ranks and D_in.
        weight: Y [D_out, k]; the merged weight is Y Q.
        inverse: R [k, k] in the coordinates of Q.
    """

    rho: float
    basis: Tensor
    weight: Tensor
    inverse: Tensor

    @classmethod
    def empty(cls, in_features: int, out_features: int, rho: float) -> MergedWeight:
        """Return the state before the first task: the weight 0.

        Raises:
            ValueError: If rho is not positive.
        """
        if not rho > 0:
            raise ValueError(f"rho must be positive, got {rho}")
        basis = torch.zeros(0, in_features, dtype=torch.float64)
        return cls(rho, basis, basis.new_zeros(out_features, 0), basis.new_zeros(0, 0))

    def add(self, a: Tensor, b: Tensor) -> MergedWeight:
        """Return the state after one more task with factors a [r, D_in] and b [D_out, r] of any float dtype.

        Raises:
            ValueError: If a shape is wrong.
        """
        in_features, out_features = self.basis.shape[1], self.weight.shape[0]
        if a.shape != (b.shape[-1], in_features) or b.shape != (out_features, a.shape[0]):
            raise ValueError(
                f"a and b must be [r, {in_features}] and [{out_features}, r], "
                f"got {list(a.shape)} and {list(b.shape)}"
            )
        a, b = a.detach().to("cpu", torch.float64), b.detach().to("cpu", torch.float64)
        basis, inverse, weight = self._widened(a)
        a = a @ basis.T
        read = a @ inverse
        core = torch.eye(len(a), dtype=a.dtype) + read @ a.T
        inverse = inverse - read.T @ torch.linalg.solve(core, read)
        weight = weight + (b @ a - weight) @ a.T @ (a @ inverse)
        return MergedWeight(self.rho, basis, weight, (inverse + inverse.T) / 2)

    def factors(self) -> Factors:
        """Return a [r, D_in] and b [D_out, r] of the merged weight, r = min(k, D_out). One is orthonormal."""
        a, b = self.basis, self.weight
        if len(a) > len(b):
            b, corner = torch.linalg.qr(b)
            a = corner @ a
        return a, b

    def _widened(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Basis, R and Y after the basis was extended to span the rows of a [r, D_in] as well."""
        basis = torch.linalg.qr(torch.cat([self.basis, a]).T)[0].T.contiguous()
        old = self.basis @ basis.T
        outside = torch.eye(len(basis), dtype=a.dtype) - old.T @ old
        return basis, old.T @ self.inverse @ old + outside / self.rho, self.weight @ old


def merge(parts: Iterable[Factors], rho: float) -> Factors:
    """Merge parts (a_i, b_i) by the recursion; return the factors a [r, D_in], b [D_out, r] in float64.

    Raises:
        ValueError: If there is no part, rho is not positive or shapes differ.
    """
    parts = list(parts)
    if not parts:
        raise ValueError("parts must hold at least one pair of factors, got none")
    (a, b), *_ = parts
    merged = MergedWeight.empty(a.shape[-1], b.shape[0], rho)
    for a, b in parts:
        merged = merged.add(a, b)
    return merged.factors()
