"""Steps of a forward that `torch.compile` leaves out of its graphs: queries, routes, memories of caches.

This module is imported by the first forward, because its decorator loads the compiler and Triton with it.
"""

from __future__ import annotations

from typing import Any

import torch

from cram.model.state import ForwardState

WHY = (
    "an attached model reads the route of a forward outside of graphs; torch.export takes strict=False, "
    "inside `with model.cram.fixed(...)`"
)


@torch.compiler.disable(reason=WHY)  # type: ignore[untyped-decorator]
def made(make: Any, *arguments: Any) -> ForwardState:
    """What `make` returns."""
    state: ForwardState = make(*arguments)
    return state


@torch.compiler.disable(reason=WHY)  # type: ignore[untyped-decorator]
def done(do: Any, *arguments: Any) -> None:
    """Call `do`."""
    do(*arguments)
