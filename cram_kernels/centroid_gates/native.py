"""centroid_gates in one native call on the CPU; the gradient is the reference's closed form.

A sample's gates do not depend, in any bit, on the other samples. Kernel: csrc/centroid_gates.cpp.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from cram_kernels.dispatch import check_one_device, constant_when_compiled
from cram_kernels.library import library_missing

NAME = "cram::native_centroid_gates"


def missing(device: torch.device | None, dtype: torch.dtype | None) -> str | None:
    """Return why the operation cannot serve such tensors, or None; then it is ready to be called."""
    if device is not None and device.type != "cpu":
        return f"tensors must be on a CPU device, got {device}"
    if dtype is not None and dtype != torch.float32:
        return f"gates must be computed in {torch.float32}, got {dtype}"
    return _ready()


@constant_when_compiled
def _ready() -> str | None:
    """Return why the library is missing, or None; then what the compiler must know is registered."""
    reason = library_missing("cpu")
    if reason is None:
        _register()
    return reason


@cache
def _register() -> None:
    torch.library.register_fake(NAME, _fake)


def centroid_gates(query: Tensor, centroids: Tensor, sigma: float, members: Tensor | None) -> Tensor:
    """Compute gates [L, S, E]; arguments as in `cram_kernels.centroid_gates`, checked, float32."""
    return torch.ops.cram.native_centroid_gates(query, centroids, sigma, members)


def _fake(query: Tensor, centroids: Tensor, sigma: float, members: Tensor | None) -> Tensor:
    check_one_device(query, centroids, members)
    return query.new_empty(centroids.shape[0], query.shape[0], centroids.shape[1])
