"""Leaf parameters that alias the last rows of packed storage: whether they still do, and who counts changes.

PyTorch counts the changes of a tensor in place, so that backward notices a step since forward. Views share
the counter of their base, but assigning `.data` shares memory alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NAMES = ("trained_a", "trained_b")


class Place(NamedTuple):
    """Where a leaf parameter lies in packed storage.

    Attributes:
        leaf: The leaf parameter that the pack itself has made.
        values: Number of its values.
        offset: Bytes of the packed storage before it.
    """

    leaf: Tensor
    values: int
    offset: int

    def is_of(self, leaf: Tensor, packed: Tensor) -> bool:
        """Whether `leaf` is here in `packed`; a tensor without address is not. Calls ask it each time."""
        if leaf is not self.leaf:
            return False
        if torch.compiler.is_compiling():
            return True
        try:
            here = leaf.data_ptr() - packed.data_ptr() == self.offset
        except RuntimeError:
            return False
        return leaf.numel() == self.values and (here or not self.values)


def place_of(leaf: Tensor, packed: Tensor) -> Place:
    """The place of a leaf parameter that stands for the last rows of `packed`."""
    rows_before = packed.shape[0] - leaf.shape[0]
    return Place(leaf, leaf.numel(), rows_before * packed.stride(0) * packed.itemsize)


def ending_in(name: str, packed: Tensor, leaf: Tensor | None, place: Place) -> Tensor:
    """Return `packed` where `leaf` lies at its place in there, else a copy that ends in the values of `leaf`.

    Args:
        name: What the leaf is called.
        packed: Packed factors [R, D].
        leaf: What stands in the place of the leaf parameter; None changes nothing.
        place: Where the leaf parameter that the pack has made belongs.

    Raises:
        ValueError: If `leaf` has another shape than the rows that it stands for.
    """
    if leaf is None or place.is_of(leaf, packed):
        return packed
    shape = (place.values // packed.shape[1], packed.shape[1])
    if leaf.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(leaf.shape)}")
    return torch.cat([packed[: len(packed) - shape[0]], leaf.detach().to(packed.dtype)])


def counted_with(leaf: Tensor, packed: Tensor) -> Tensor:
    """Return `packed` as a view of `leaf`, which has the memory of its last rows, and the leaf's counter."""
    return leaf.detach().as_strided(packed.shape, packed.stride(), packed.storage_offset())
