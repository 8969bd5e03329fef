"""One Triton kernel launch as data: what runs, what a compiler needs, what it costs.

A launcher returns a `Launch`; running it, compiling it ahead of time for an architecture without a GPU, and
computing how far it is from the hardware's floor all start from that one description. Needs no Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel with its grid, arguments, compile options and cost.

    Args:
        kernel: The `triton.jit` function.
        grid: Programs along up to three axes; a launch with an empty axis does nothing.
        arguments: Runtime arguments by name, in the kernel's order: tensors, integers, floats, None.
        constants: Compile-time arguments by name, in the kernel's order behind `arguments`.
        warps: Warps a program.
        stages: Depth of the software pipeline.
        cost: Returns `moved_bytes` and `flops`; called only where somebody asks.
        late: Names of the arguments that the kernel in front writes while this one starts (programmatic dependent
            launch); this kernel must wait for it before it reads them. Empty: it starts when that one has ended.
            Only architectures from sm_90 on have it.
        steps: How often a program passes the kernel's loop; 1 for a kernel without one.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    warps: int
    stages: int
    cost: Callable[[], tuple[int, int]]
    late: tuple[str, ...] = ()
    steps: int = 1

    @property
    def moved_bytes(self) -> int:
        """Least bytes through device memory: every input read once, every output written once."""
        return self.cost()[0]

    @property
    def flops(self) -> int:
        """Floating-point operations on tensor cores (two a multiply-add), tile padding left out."""
        return self.cost()[1]

    @property
    def dependent(self) -> bool:
        """Whether this kernel starts before the one in front has ended."""
        return bool(self.late)

    def run(self) -> None:
        """Launch on the current stream of the tensors' device."""
        if not all(self.grid):
            return
        options: dict[str, Any] = {"num_warps": self.warps, "num_stages": self.stages}
        if self.late:
            options["launch_pdl"] = True
        self.kernel[self.grid](**self.arguments, **self.constants, **options)

    def floor_us(self, bytes_per_us: float, flops_per_us: float) -> float:
        """Return the least time in microseconds at a copy bandwidth and a matrix-product rate."""
        moved_bytes, flops = self.cost()
        return max(moved_bytes / bytes_per_us, flops / flops_per_us)


def cdiv(size: int, block: int) -> int:
    """Return how many blocks cover `size`. Triton's own, on the host, costs a microsecond a call."""
    return -(-size // block)


def power_of_two(size: int) -> int:
    """Return the least power of two that is not less than `size` (1 or more)."""
    return 1 << (size - 1).bit_length()


def nbytes(*tensors: Tensor | None) -> int:
    """Return the bytes of the tensors' elements; None counts nothing."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which launches go to the tensor's device; does nothing where they already do."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def architecture(device: torch.device) -> int:
    """Return the compute capability of a CUDA device as 10 * major + minor; 90 under the interpreter."""
    return _capability(device.index) if device.type == "cuda" else 90


@cache
def _capability(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor
