"""Whether the rows of a KV cache stand where the last forward left them.

Each row of a batch has the route of its prompt. Who reorders a cache, or takes rows or tokens out of it,
copies keys bit for bit into new tensors. So every forward leaves marks, which are a few keys of each row. The
next forward finds them again at the same rows, or at rows of the same route, such as beams of one prompt.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cram.model.state import ForwardState

# Marks of a row: so many tokens, evenly spaced over what the cache holds, and so many values of each.
TOKENS, VALUES = 16, 8


class Marks(NamedTuple):
    """What the rows of a cache are known by.

    Attributes:
        keys: The tensor of keys that the last forward left.
        exchange: [B, B] bool, rows that may take each other's places.
        first: Position of the first marked token.
        step: Distance of the marked tokens.
        values: [B, K, VALUES], keys of the marked tokens.
    """

    keys: weakref.ref[Tensor]
    exchange: Tensor
    first: int
    step: int
    values: Tensor

    def after(self, cache: Any) -> Marks:
        """The marks of the same rows after one more forward; a sliding window leaves older ones behind."""
        layer = _layer(cache)
        if not getattr(layer, "is_sliding", False):
            return self._replace(keys=weakref.ref(layer.keys))
        own = _places(len(layer.keys), self.exchange)
        return _made(layer, self.exchange[own][:, own]) or self

    def have_moved(self, cache: Any) -> bool:
        """Whether a row stands at the place of a row with another route."""
        layer = _layer(cache)
        if layer is None or self.keys() is layer.keys:
            return False
        begin, held = _span(layer)
        places = range(self.first, self.first + self.step * self.values.shape[1], self.step)
        kept = [index for index, place in enumerate(places) if begin <= place < begin + held]
        if not kept:
            return True
        start = places[kept[0]] - begin
        found = _values(layer, start, held, self.step)[:, : len(kept)].to(self.values.device)
        same = _distances(found, self.values[:, kept[0] : kept[0] + found.shape[1]]) == 0
        own = _places(len(found), self.exchange)
        return not bool((same & self.exchange[own]).any(1).all())


def marks_of(cache: Any, state: ForwardState) -> Marks | None:
    """The marks that a prefill leaves.

    Args:
        cache: The cache that it has filled.
        state: The state of its decode steps.

    Returns:
        The marks, or None where all rows are alike or the cache keeps no keys as they are.
    """
    layer = _layer(cache) if state.differs_by_row else None
    return None if layer is None else _made(layer, _exchangeable(state, len(layer.keys)))


def _made(layer: Any, exchange: Tensor) -> Marks | None:
    begin, held = _span(layer)
    if not held or bool(exchange.all()):
        return None
    step = max(1, held // TOKENS)
    return Marks(weakref.ref(layer.keys), exchange, begin, step, _values(layer, 0, held, step).clone())


def _exchangeable(state: ForwardState, rows: int) -> Tensor:
    """[B, B] (bool), which rows have the same route and the same query, up to rounding."""
    assert state.route is not None
    gates, query = state.route.gates, state.query
    tensors = [gates.transpose(0, 1), state.features, *state.memory.values()]
    tensors += [] if query is None else [query.text, query.image]
    same = torch.ones(rows, rows, dtype=torch.bool, device=gates.device)
    for each in tensors:
        if each is not None and rows % len(each) == 0:
            own = _places(rows, each)
            distances = _distances(each, each).to(same.device)
            eps = torch.finfo(each.dtype if each.is_floating_point() else torch.float32).eps
            close = distances <= 8 * eps * _numbers(each).abs().amax().to(same.device)
            same &= close[own][:, own]
    return same


def _layer(cache: Any) -> Any:
    """The last layer of a cache that keeps the keys [B, heads, T, D] of its tokens as they are, or None."""
    for layer in reversed(getattr(cache, "layers", None) or []):
        keys = getattr(layer, "keys", None)
        if isinstance(keys, Tensor) and keys.dim() == 4:
            whole = isinstance(length := layer.get_seq_length(), Tensor) or length <= keys.shape[-2]
            return layer if whole or getattr(layer, "is_sliding", False) else None
    return None


def _span(layer: Any) -> tuple[int, int]:
    """Position of the first token that a layer holds, and how many it holds."""
    length, room = int(layer.get_seq_length()), layer.keys.shape[-2]
    return max(length - room, 0), min(length, room)


def _values(layer: Any, start: int, held: int, step: int) -> Tensor:
    """[B, K, VALUES], a few values of the keys at every `step`-th token that a layer holds."""
    return layer.keys[:, 0, start:held:step, :VALUES].detach()


def _distances(found: Tensor, known: Tensor) -> Tensor:
    """[N, M], the largest difference of each row of one tensor from each row of another."""
    return torch.cdist(_numbers(found).flatten(1), _numbers(known).flatten(1), p=torch.inf)


def _numbers(tensor: Tensor) -> Tensor:
    """A tensor of any dtype in float32, without NaN."""
    return tensor.detach().float().nan_to_num()


def _places(rows: int, known: Tensor) -> Tensor:
    """[rows], which of the known rows each row comes from; a row may stand for several."""
    return torch.arange(rows, device=known.device) * len(known) // max(rows, 1)
