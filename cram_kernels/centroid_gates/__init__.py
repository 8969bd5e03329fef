"""Softmax over centroid distances, all layers at once."""

from cram_kernels.centroid_gates.api import centroid_gates

__all__ = ["centroid_gates"]
