"""KV caches: what transformers calls them, and which forward filled each of them.

transformers renames `past_key_values` to `cache` in arguments and outputs. This module alone knows both
names.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cram.model.rows import Marks, marks_of
from cram.model.state import ForwardState
from cram.routing.prompts import Call

CACHE_NAMES = ("cache", "past_key_values")


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The KV cache among the keyword arguments of a forward, or None."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def made_cache(output: Any) -> Any:
    """The KV cache that a forward has returned, or None."""
    return next((found for name in CACHE_NAMES if (found := getattr(output, name, None)) is not None), None)


def cache_argument(model: nn.Module) -> str:
    """The name of the argument by which the forward of a model takes a KV cache."""
    taken = inspect.signature(model.forward).parameters
    return next(name for name in CACHE_NAMES if name in taken)


class _Filled(NamedTuple):
    """A cache as a forward of this model has left it.

    Attributes:
        state: The state of the forwards that continue the cache.
        version: See `_version`.
        marks: What its rows are known by, or None where they need no check.
    """

    state: ForwardState
    version: int | None
    marks: Marks | None = None


_KEPT = "cram_kept"


class _Kept:
    """What a traced decode step finds at its cache, because guards on a weak dictionary do not hold.

    Attributes:
        state: The state of the forwards that continue the cache; None in a copy of the cache.
    """

    def __init__(self, state: ForwardState | None) -> None:
        self.state = state

    def __deepcopy__(self, memo: Any) -> _Kept:
        return _Kept(None)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Kept, (None,)


class CacheStates:
    """Remembers with each KV cache the state of the forward that filled it.

    Attributes:
        prompts: By state what its query was read from, where the query was read automatically.
    """

    def __init__(self) -> None:
        """No cache is known yet."""
        self._filled: weakref.WeakKeyDictionary[Any, _Filled] = weakref.WeakKeyDictionary()
        self.prompts: weakref.WeakKeyDictionary[ForwardState, Call] = weakref.WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        """Copies leave out the states: their gates belong to a live autograd graph or to other caches."""
        return {}

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def get(self, cache: Any) -> ForwardState | None:
        """The state under which a cache is continued, or None for no cache or an unknown one."""
        if torch.compiler.is_compiling():
            kept = getattr(cache, _KEPT, None)
            return None if kept is None else kept.state
        return self._filled[cache].state if cache is not None and cache in self._filled else None

    def keep(self, cache: Any, state: ForwardState) -> None:
        """Remember the state of the forward that has just filled a cache."""
        known = self._filled.get(cache)
        if known is not None and known.state is state:
            marks = None if known.marks is None else known.marks.after(cache)
        else:
            state, made = state.continued(), state
            marks = marks_of(cache, state)
            if made in self.prompts:
                self.prompts[state] = self.prompts[made]
        self._remember(cache, state, marks)

    def has_moved_rows(self, cache: Any) -> bool:
        """Whether rows of a cache stand at the places of other prompts since its last forward.

        Beams of one prompt may change their places. A traced step does not look.
        """
        if torch.compiler.is_compiling():
            return False
        marks = self._filled[cache].marks
        return marks is not None and marks.have_moved(cache)

    def adopt(self, cache: Any, state: ForwardState) -> None:
        """Let `state` continue a cache that was put together from rows of other caches."""
        self._remember(cache, state)

    def _remember(self, cache: Any, state: ForwardState, marks: Marks | None = None) -> None:
        self._filled[cache] = _Filled(state, _version(cache.get_seq_length()), marks)
        setattr(cache, _KEPT, _Kept(state))

    def is_cut_short(self, cache: Any, state: ForwardState) -> bool:
        """Whether the end of a cache's prompt was taken out again, so that another one may follow.

        A static cache cannot be cut, and a traced step continues none that was.
        """
        prompt = self.prompts.get(state) if not torch.compiler.is_compiling() else None
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
        known, version = self._filled.get(cache), _version(length)
        if known is not None and known.version == version and (version is not None or tokens == 1):
            return True
        return bool(length > 0)


def _version(length: Any) -> int | None:
    """How often a cache's count of tokens was written, known on the host; None where nothing tells it."""
    if not isinstance(length, Tensor) or length.is_inference():
        return None
    return int(length._version)
