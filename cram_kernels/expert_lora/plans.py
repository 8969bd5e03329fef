"""Pairs of launches that are kept for calls of one kind: a later decode step describes and compiles nothing.

The first call of a kind describes both launches and keeps them with their compiled kernels; later calls of
the same shapes, dtypes and alignments fill in their tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cram_kernels import dispatch
from cram_kernels.launch import Launch, Prepared, hooked

# Kinds of calls that are kept.
MOST_PLANS = 1024

Memory = tuple[torch.Size, torch.dtype]


class Plan(NamedTuple):
    """The two launches of one kind of call, and the memory that they write beside the results."""

    memory: tuple[Memory, ...]
    first: Prepared
    second: Prepared

    def run(
        self, inputs: Sequence[Tensor | None], ys: Sequence[Tensor], device: torch.device
    ) -> list[Tensor]:
        """Launch on the current stream and return the memory.

        Shapes, dtypes and alignments are those of the first tensors.
        """
        memory = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self.memory]
        tensors = (*inputs, *memory, *ys)
        self.first.run(tensors)
        self.second.run(tensors)
        return memory


# None: a launch reads a tensor that is made for each call, such as a copy.
_PLANS: dict[Any, Plan | None] = {}


def possible() -> bool:
    """Whether calls can be kept: kernels are compiled, and no profiler wants to hear of each launch."""
    return not dispatch.interpreted() and not hooked()


def find(key: Any) -> Plan | None:
    """Return what is kept for calls of a kind."""
    return _PLANS.get(key)


def keep(
    key: Any, tensors: Sequence[Tensor | None], memory: Sequence[Tensor], first: Launch, second: Launch
) -> None:
    """Keep both launches, unless one reads a tensor that was made for this call.

    Args:
        key: Everything by which the launches of one call differ from those of another.
        tensors: What `Plan.run` gets, in its order: inputs, memory, results.
        memory: What is allocated in each call.
        first, second: The launches.
    """
    given = [id(tensor) for tensor in tensors if tensor is not None]
    # A tensor in two places does not say which of the two a launch reads.
    if key in _PLANS or len(set(given)) < len(given):
        return
    ready = first.prepared(tensors), second.prepared(tensors)
    if len(_PLANS) >= MOST_PLANS:
        _PLANS.clear()
    _PLANS[key] = None
    if ready[0] is not None and ready[1] is not None:
        _PLANS[key] = Plan(tuple((each.shape, each.dtype) for each in memory), ready[0], ready[1])


def factor_kinds(factors: Sequence[Tensor]) -> list[Any]:
    """Return what launches depend on of packed factors."""
    return [(f.shape[0], f.dtype, f.is_contiguous(), f.data_ptr() & 15 == 0) for f in factors]


def aligned(tensors: Sequence[Tensor | None]) -> list[bool | None]:
    """Return which tensors start on 16 bytes; None for an absent one."""
    return [None if tensor is None else tensor.data_ptr() & 15 == 0 for tensor in tensors]


def segments_kind(segments: Tensor | None) -> Any:
    """Return what launches depend on of a map of tokens to rows of gates."""
    return None if segments is None else (segments.dtype, segments.is_contiguous())
