"""Steps of a forward that `torch.compile` leaves out of its graphs: queries, routes, memories of caches.

This module is imported where a graph is traced, because its decorator loads the compiler and Triton with it.
"""

from __future__ import annotations

from typing import Any

import torch

WHY = (
    "an attached model reads the route of a forward outside of graphs; torch.export takes strict=False, "
    "inside `with model.cram.fixed(...)`"
)


@torch.compiler.disable(reason=WHY)  # type: ignore[untyped-decorator]
def done(do: Any, *arguments: Any) -> Any:
    """What `do` returns."""
    return do(*arguments)
