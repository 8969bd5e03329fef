"""Triton's JIT without a device: a driver that names a target, and kernels that compile and do not launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Target:
    """A driver without a device: all that the JIT asks of one before it launches."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._arch, self._target = arch, GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        # The JIT keeps what it compiled by device.
        return self._arch

    def get_current_stream(self, device: int) -> int:
        return 0


class _Pointer:
    """A tensor as the JIT sees one: a type and an address."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype = tensor.dtype
        self._address = tensor.storage_offset() * tensor.element_size()

    def data_ptr(self) -> int:
        return self._address


class Warm:
    """Stands in for a kernel in `Launch.run`: compiles and keeps the result instead of launching."""

    def __init__(self, kernel: Any) -> None:
        self._kernel, self.result = kernel, None

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def build(**arguments: Any) -> None:
            given = {name: _pointers(value) for name, value in arguments.items()}
            self.result = self._kernel.run(grid=grid, warmup=True, **given)

        return build


def _pointers(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return _Pointer(value)
    if isinstance(value, tuple):
        items = [_pointers(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value
