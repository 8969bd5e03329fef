"""What a frozen vision tower says of each picture, computed once for many forwards.

A comparison shows the same pictures to the same tower again and again: a task's tests after each later task,
and all pictures in each trial of a search.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from cram.families import family_of

MAX_BYTES = 2 << 30
# The tower sees exactly so many pictures at a time, so its answer to one depends on nothing else by a bit.
PASS = 16

Forward = Callable[[Tensor], Any]


class SeenPictures:
    """A tower's outputs by picture. What does not fit into the memory is computed at each use.

    Args:
        max_bytes: Memory for outputs.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._left = max_bytes
        self._known: dict[bytes, Any] = {}

    def __len__(self) -> int:
        return len(self._known)

    @contextmanager
    def shown_to(self, model: nn.Module) -> Iterator[None]:
        """Inside, the tower of a model runs only for pictures that are not known.

        A tower that trains or is not on the CPU stays as it is. So does a call with more tensors than the
        pictures [N, C, H, W].

        Args:
            model: The base. All models of one object must have equal towers.
        """
        tower: Any = model.get_submodule(family_of(model).vision_tower)
        if any(parameter.requires_grad or not parameter.is_cpu for parameter in tower.parameters()):
            yield
            return
        forward = tower.forward

        def remembered(*args: Any, **named: Any) -> Any:
            given = [value for value in (*args, *named.values()) if isinstance(value, Tensor)]
            if len(given) != 1 or given[0].dim() != 4 or not len(given[0]):
                return forward(*args, **named)
            (pictures,) = given

            def seen(some: Tensor) -> Any:
                values = [some if value is pictures else value for value in (*args, *named.values())]
                return forward(*values[: len(args)], **dict(zip(named, values[len(args) :], strict=True)))

            settings = (
                [value for value in args if value is not pictures],
                sorted((name, value) for name, value in named.items() if value is not pictures),
            )
            return self._output(pictures, repr((pictures.dtype, settings)), seen)

        tower.forward = remembered
        try:
            yield
        finally:
            del tower.forward

    @torch.no_grad()
    def _output(self, pictures: Tensor, call: str, forward: Forward) -> Any:
        """The tower's output for pictures [N, C, H, W]."""
        keys = [_key(picture, call) for picture in pictures]
        rows = {key: self._known[key] for key in keys if key in self._known}
        new = {key: picture for key, picture in zip(keys, pictures, strict=True) if key not in rows}
        waiting = list(new)
        while waiting:
            some, waiting = waiting[:PASS], waiting[PASS:]
            filled = [*some, *some[-1:] * (PASS - len(some))]
            output = forward(torch.stack([new[key] for key in filled]))
            self._keep(output, found := {key: _row(output, place) for place, key in enumerate(some)})
            rows |= found
        return tree_map(_stacked, *[rows[key] for key in keys])

    def _keep(self, output: Any, rows: dict[bytes, Any]) -> None:
        tensors = [part for part in tree_leaves(output) if isinstance(part, Tensor)]
        size = sum({part.data_ptr(): part.nbytes for part in tensors}.values())
        if size <= self._left:
            self._left -= size
            self._known |= rows


def _key(picture: Tensor, call: str) -> bytes:
    pixels = picture.contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(pixels, digest_size=16).digest() + call.encode()


def _row(output: Any, place: int) -> Any:
    """One picture's part of an output: the same fields, each without its first dimension."""
    return tree_map_only(Tensor, lambda part: part[place], output)


def _stacked(*parts: Tensor | None) -> Tensor | None:
    """Parts of several pictures as one; a tower may leave out a part, and then does so for all pictures."""
    tensors = [part for part in parts if part is not None]
    return torch.stack(tensors) if tensors else None
