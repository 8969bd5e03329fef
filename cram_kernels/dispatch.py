"""Choice of implementation: names, the default rule, and why an implementation is missing.

Rule for ``impl="auto"``: the op's "cpu" implementation for tensors on a CPU where the op has one, else
"reference". An explicit name is served by exactly that implementation or refused; nothing falls back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

IMPLS = ("reference", "cpu", "triton", "native")


@dataclass(frozen=True)
class Op:
    """One public operation and its implementations.

    Args:
        name: Public function name, used in error messages.
        impls: Implementation name -> function; must contain "reference".
    """

    name: str
    impls: Mapping[str, Callable[..., Any]]

    def select(self, impl: str, device: torch.device) -> Callable[..., Any]:
        """Return the function that serves `impl` for tensors on `device`.

        Raises:
            ValueError: `impl` is none of the known names.
            NotImplementedError: `impl` is known, but this op has no such implementation.
        """
        if impl == "auto":
            return self.impls["cpu" if device.type == "cpu" and "cpu" in self.impls else "reference"]
        if impl in self.impls:
            return self.impls[impl]
        if impl not in IMPLS:
            raise ValueError(f"impl must be one of {('auto', *IMPLS)}, got {impl!r}")
        raise NotImplementedError(self.why_missing(impl))

    def why_missing(self, impl: str) -> str:
        """Return the reason why `impl` cannot be had, naming what can."""
        return f"{self.name} has no {impl!r} implementation; it has {tuple(self.impls)}"

    def availability(self) -> dict[str, str | None]:
        """Return implementation name -> None where available, else the reason."""
        return {impl: None if impl in self.impls else self.why_missing(impl) for impl in IMPLS}
