"""KV caches: what transformers calls them, and which forward filled each of them.

transformers renames `past_key_values` to `cache` in arguments and outputs. This module alone knows both
names.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cram.model.rows import Marks, marks_of
from cram.model.state import ForwardState

CACHE_NAMES = ("cache", "past_key_values")


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The KV cache among the keyword arguments of a forward, or None."""
    for name in CACHE_NAMES:
        if arguments.get(name) is not None:
            return arguments[name]
    return None


def made_cache(output: Any) -> Any:
    """The KV cache that a forward has returned, or None."""
    for name in CACHE_NAMES:
        if (found := getattr(output, name, None)) is not None:
            return found
    return None


def cache_argument(model: nn.Module) -> str:
    """The name of the argument by which the forward of a model takes a KV cache."""
    taken = inspect.signature(model.forward).parameters
    return next(name for name in CACHE_NAMES if name in taken)


_KEPT = "cram_kept"


class _Kept:
    """A cache as a forward of a model has left it; the cache itself holds it.

    Guards of traced graphs hold on an attribute, and an attribute costs a token less than a weak dictionary.

    Attributes:
        owner: The `CacheStates` of the model; None in a copy of the cache, whose state is not known.
        cache: The cache, because a shallow copy of it has the same attributes.
        state: The state of the forwards that continue the cache.
        version: See `_version`.
        marks: What its rows are known by, or None where they need no check.
    """

    def __init__(
        self,
        owner: Any = None,
        cache: Any = None,
        state: ForwardState | None = None,
        marks: Marks | None = None,
    ) -> None:
        self.owner, self.state, self.marks = owner, state, marks
        self.cache = None if cache is None else weakref.ref(cache)
        self.version = None if cache is None else _version(cache.get_seq_length())

    def __deepcopy__(self, memo: Any) -> _Kept:
        return _Kept()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Kept, ()


class CacheStates:
    """Remembers with each KV cache of a model the state of the forward that filled it."""

    def _kept(self, cache: Any) -> _Kept | None:
        """What is known of a cache, or None of no cache, of another model's, and of a copy."""
        kept: _Kept | None = getattr(cache, _KEPT, None)
        if kept is None or kept.owner is not self or kept.cache is None or kept.cache() is not cache:
            return None
        return kept

    def get(self, cache: Any) -> ForwardState | None:
        """The state under which a cache is continued, or None for no cache or an unknown one."""
        if torch.compiler.is_compiling():
            kept = getattr(cache, _KEPT, None)
            return None if kept is None else kept.state
        kept = self._kept(cache)
        return None if kept is None else kept.state

    def is_remembered(self, cache: Any, state: ForwardState) -> bool:
        """Whether a forward under `state` has left nothing new to `keep`, which is dearer."""
        kept = self._kept(cache)
        return kept is not None and kept.state is state and kept.marks is None and kept.version is None

    def keep(self, cache: Any, state: ForwardState) -> None:
        """Remember the state of the forward that has just filled a cache."""
        kept = self._kept(cache)
        if kept is not None and kept.state is state:
            kept.version = _version(cache.get_seq_length())
            kept.marks = None if kept.marks is None else kept.marks.after(cache)
        else:
            state = state.continued()
            self.adopt(cache, state, marks_of(cache, state))

    def has_moved_rows(self, cache: Any) -> bool:
        """Whether rows of a cache stand at the places of other prompts since its last forward.

        Beams of one prompt may change their places. A traced step does not look.
        """
        if torch.compiler.is_compiling():
            return False
        kept = self._kept(cache)
        return kept is not None and kept.marks is not None and kept.marks.have_moved(cache)

    def adopt(self, cache: Any, state: ForwardState, marks: Marks | None = None) -> None:
        """Let `state` continue a cache, such as one that was put together from rows of other caches."""
        setattr(cache, _KEPT, _Kept(self, cache, state, marks))

    def is_cut_short(self, cache: Any, state: ForwardState) -> bool:
        """Whether the end of a cache's prompt was taken out again, so that another one may follow.

        A static cache cannot be cut, and a traced step continues none that was.
        """
        prompt = state.prompt if not torch.compiler.is_compiling() else None
        if prompt is None or prompt.input_ids is None:
            return False
        length = cache.get_seq_length()
        return not isinstance(length, Tensor) and int(length) < prompt.input_ids.shape[1]

    def is_filled(self, cache: Any, tokens: int) -> bool:
        """Whether a forward of `tokens` tokens continues what a cache holds.

        A static cache counts its tokens on its device, and reading the count would synchronise every decode
        step. The count is not read where the last forward of this model left the cache as it is now. In
        inference mode tensors have no version: a single token then continues every cache that is known.
        """
        if cache is None:
            return False
        if torch.compiler.is_compiling():
            # A traced count has no version. A whole prompt is not traced; see `cram.model.hooks`.
            return tokens == 1 and self.get(cache) is not None
        length = cache.get_seq_length()
        if not isinstance(length, Tensor):
            return bool(length > 0)
        known, version = self._kept(cache), _version(length)
        if known is not None and known.version == version and (version is not None or tokens == 1):
            return True
        return bool(length > 0)


def _version(length: Any) -> int | None:
    """How often a cache's count of tokens was written, known on the host; None where nothing tells it."""
    if not isinstance(length, Tensor) or length.is_inference():
        return None
    return int(length._version)
