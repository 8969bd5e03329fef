"""Choice of implementation: names, the default rule, and why an implementation is missing.

Rule for ``impl="auto"``: the first implementation that the op has and that can run, in the order of `AUTO`
for the device. An explicit name is served by exactly that implementation or refused; nothing falls back.
Inside a level of forward-mode differentiation an implementation that knows no tangents cannot run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad

IMPLS = ("reference", "cpu", "triton", "native")
# On a GPU "cpu" is the same arithmetic in a few large eager operations, which beats the reference's loop.
AUTO = {"cpu": ("native", "cpu", "reference"), "cuda": ("native", "triton", "cpu", "reference")}
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Function = TypeVar("Function", bound=Callable[..., Any])
# Why an implementation cannot serve tensors of this device and dtype (None, None: at all), or None if it can.
Missing = Callable[[torch.device | None, torch.dtype | None], str | None]


@dataclass(frozen=True)
class Op:
    """One public operation and its implementations.

    Args:
        name: Public function name, used in error messages.
        impls: Implementation name -> function; must contain "reference".
        missing: Implementation name -> why it cannot run here; names left out always can.
        tangents: Names of those that forward-mode differentiation passes through; must contain "reference".
    """

    name: str
    impls: Mapping[str, Callable[..., Any]]
    missing: Mapping[str, Missing] = field(default_factory=dict)
    tangents: tuple[str, ...] = ("reference",)
    _chosen: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def select(self, impl: str, device: torch.device, dtype: torch.dtype | None = None) -> Callable[..., Any]:
        """Return the function that serves `impl` for tensors on `device`, of `dtype` where that matters.

        What can run does not change within a process, so a choice is made once.

        Raises:
            ValueError: `impl` is none of the known names.
            NotImplementedError: `impl` is known, but this op does not have it or it cannot run here.
        """
        key = (impl, device, dtype, in_forward_mode())
        found = self._chosen.get(key)
        if found is None:
            found = self._chosen[key] = self._select(*key)
        return found

    def _select(
        self, impl: str, device: torch.device, dtype: torch.dtype | None, forward_mode: bool
    ) -> Callable[..., Any]:
        if impl == "auto":
            for name in AUTO.get(device.type, ("reference",)):
                able = name in self.tangents or not forward_mode
                if able and self.why_missing(name, device, dtype) is None:
                    return self.impls[name]
            return self.impls["reference"]
        if impl not in IMPLS:
            raise ValueError(f"impl must be one of {('auto', *IMPLS)}, got {impl!r}")
        reason = self.why_missing(impl, device, dtype)
        if reason is not None:
            raise NotImplementedError(reason)
        if forward_mode and impl not in self.tangents:
            raise NotImplementedError(
                f"{self.name} must have impl 'auto' or one of {self.tangents} inside a level of forward-mode "
                f"differentiation (torch.func.jvp, forward_ad.dual_level), got {impl!r}"
            )
        return self.impls[impl]

    def why_missing(
        self, impl: str, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> str | None:
        """Return why `impl` cannot be had for tensors of this device and dtype, or None if it can."""
        if impl not in self.impls:
            return f"{self.name} has no {impl!r} implementation; it has {tuple(self.impls)}"
        reason = self.missing[impl](device, dtype) if impl in self.missing else None
        return None if reason is None else f"{self.name} cannot run {impl!r} here: {reason}"

    def availability(self) -> dict[str, str | None]:
        """Return implementation name -> None where available, else the reason."""
        return {impl: self.why_missing(impl) for impl in IMPLS}


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Return a context without autocast; does nothing where autocast is off already."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def check_devices(device: torch.device, **tensors: torch.Tensor | None) -> None:
    """Raise ValueError where a tensor does not lie where the operation runs; None is left out."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} must be on {device} like the first argument, got {tensor.device}")


def check_one_device(first: torch.Tensor, *arguments: Any) -> None:
    """Raise ValueError where a tensor, alone or in a list, is not where the first one is; for fake results.

    torch asks for a fake result not only while it traces, but also for one meta tensor among others.
    """
    for argument in arguments:
        for tensor in argument if isinstance(argument, list | tuple) else (argument,):
            if isinstance(tensor, torch.Tensor) and tensor.device != first.device:
                raise ValueError(
                    f"all tensors must be on {first.device} like the first argument, got {tensor.device}"
                )


def triton_missing(device: torch.device | None, dtype: torch.dtype | None) -> str | None:
    """Return why the Triton kernels cannot serve such tensors; `Missing` for every op that has them.

    Kernels run on CUDA devices, and on CPU tensors under Triton's interpreter (TRITON_INTERPRET=1, set before
    Triton is imported), which is right in float32 and float16 only.
    """
    reason = _triton_environment()
    if reason is not None:
        return reason
    if device is not None and device.type == "cpu" and not interpreted():
        return "CPU tensors need Triton's interpreter (set TRITON_INTERPRET=1)"
    if device is not None and device.type not in ("cpu", "cuda"):
        return f"tensors must be on a CUDA device, got {device}"
    if dtype is not None and dtype not in TRITON_DTYPES:
        return f"dtype must be one of {TRITON_DTYPES}, got {dtype}"
    if device is not None and device.type == "cpu" and dtype is torch.bfloat16:
        return "Triton's interpreter computes wrong bfloat16 products; use float32 or float16"
    return None


def constant_when_compiled(function: Function) -> Function:
    """Let the compiler take a function's result as a constant instead of tracing it.

    `torch.compiler.assume_constant_result` does the same, but loads the compiler and Triton with it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def in_forward_mode() -> bool:
    """Whether a level of forward-mode differentiation is open, in which any tensor may carry a tangent.

    A tensor itself does not tell: a dual one has `requires_grad` False. The compiler traces this function, so
    that it compiles its caller anew for another level.
    """
    return forward_ad._current_level >= 0


@constant_when_compiled
def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def _installed(package: str) -> bool:
    return find_spec(package) is not None


@constant_when_compiled
def _triton_environment() -> str | None:
    if not _installed("triton"):
        return "triton is not installed (pip install 'cram-mcit[triton]')"
    if not (torch.cuda.is_available() or interpreted()):
        return "no CUDA device, and Triton's interpreter is off (TRITON_INTERPRET=1 turns it on)"
    return None
