"""Penalty that keeps a new expert's output out of the old experts' span."""

from cram_kernels.orthogonality.api import orthogonality_penalty
from cram_kernels.orthogonality.basis import orthonormal_basis
from cram_kernels.orthogonality.pooling import visual_mean

__all__ = ["orthogonality_penalty", "orthonormal_basis", "visual_mean"]
