"""Penalty that keeps a new expert's output out of the old experts' span."""

from cram_kernels.orthogonality.api import orthogonality_penalty, orthonormal_basis

__all__ = ["orthogonality_penalty", "orthonormal_basis"]
