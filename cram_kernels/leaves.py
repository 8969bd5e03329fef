"""Leaf parameters that alias the last rows of packed storage: whether they still do, and who counts changes.

PyTorch counts the changes of a tensor in place, so that backward notices a step since forward. Views share
the counter of their base, but assigning `.data` shares memory alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

NAMES = ("trained_a", "trained_b")


def ending_in(name: str, packed: Tensor, first: int, leaf: Tensor | None, own: Tensor | None) -> Tensor:
    """Return `packed` where the memory of `leaf` is that of its last rows, else a copy that ends in `leaf`.

    Args:
        name: What the leaf is called.
        packed: Packed factors [R, D].
        first: The first row of `packed` that the leaf stands for.
        leaf: What stands in the place of the leaf parameter; None changes nothing.
        own: The leaf parameter that the pack itself has made.

    Raises:
        ValueError: If `leaf` is not [R - first, D].
    """
    if leaf is None or (leaf is own and (torch.compiler.is_compiling() or _lies_at(packed, first, leaf))):
        return packed
    shape = (len(packed) - first, packed.shape[1])
    if leaf.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(leaf.shape)}")
    return torch.cat([packed[:first], leaf.detach().to(packed.dtype)])


def _lies_at(packed: Tensor, first: int, leaf: Tensor) -> bool:
    """Whether `leaf` has the memory of the rows of `packed` from one on; a tensor without address has not."""
    if leaf.shape[0] != packed.shape[0] - first:
        return False
    try:
        start = packed.data_ptr() + first * packed.stride(0) * packed.itemsize
        return leaf.data_ptr() == start or not leaf.numel()
    except RuntimeError:
        return False


def counted_with(leaf: Tensor, packed: Tensor) -> Tensor:
    """Return `packed` as a view of `leaf`, which has the memory of its last rows, and the leaf's counter."""
    return leaf.detach().as_strided(packed.shape, packed.stride(), packed.storage_offset())
