"""Reading a prompt: in one forward, or in pieces between which answers in flight get their tokens.

A long prompt takes these steps:

    embed      the core runs up to its language model: images, embeddings, positions, and the route
    pieces     the language model reads some tokens at a time behind the cache of those before
    head       the scores of the last token

The prompt's length alone decides the size of its pieces, so that its numbers do not depend on who else is
served. A prompt of one piece runs as an offline prefill does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cram.learning.batches import to_model
from cram.model.cache import CACHE_NAMES, cache_argument, made_cache
from cram.model.hooks import STATE
from cram.model.state import ForwardState
from cram.serve.engine.decide import Decider
from cram.serve.engine.versions import Version
from cram.serve.request import Request

# What the language models of the families take with one entry per token, and in which dimension.
PER_TOKEN = {"inputs_embeds": 1, "position_ids": -1, "visual_pos_masks": 1, "cache_position": 0}


class Read(NamedTuple):
    """A prompt that has been read.

    Attributes:
        cache: The keys and values of its one row.
        state: The state with which its answers are decoded.
        logits: Of its last token, [V].
        position: What is added to the number of cached tokens for the position of the next one.
    """

    cache: Any
    state: ForwardState
    logits: Tensor
    position: int


class _ReachedError(Exception):
    """Ends a forward where its language model begins."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.arguments = arguments


@dataclass
class _Embedded:
    """A prompt in front of the language model.

    Attributes:
        arguments: What the language model is called with.
        state: The state of the forward that made them; its route serves all pieces.
        position: See `Read`.
        cache: Keys and values of the pieces that have been read.
    """

    arguments: dict[str, Any]
    state: ForwardState
    position: int
    cache: Any


class Prefill:
    """A prompt on its way through the model.

    Attributes:
        request: The request.
        version: The experts with which the prompt is read and answered; None before the first step.
        ids: The prompt [T].
        limit: Tokens of an answer at most.
        left: Tokens that have not been read.
        skipped: How often a shorter prompt has gone first.
    """

    def __init__(self, model: Any, decider: Decider, request: Request, inputs: Mapping[str, Tensor]) -> None:
        self._model, self._decider = model, decider
        self._core: Any = model.get_submodule(model.cram.family.core)
        self._language: Any = model.get_submodule(model.cram.family.language_model)
        self._inputs = to_model(dict(inputs), model)
        self._embedded: _Embedded | None = None
        self.request = request
        self.version: Version | None = None
        self.ids = self._inputs["input_ids"][0]
        self.left, self.limit, self.skipped = len(self.ids), 0, 0

    @torch.no_grad()
    def advance(self, piece: int) -> Read | None:
        """Take one step; the result of the last one is the whole prompt.

        Args:
            piece: See `piece_tokens`; the same in every step of a prompt.

        Raises:
            RequestError: As `Decider.routed`.
        """
        size = piece_tokens(len(self.ids), piece)
        if self._embedded is not None:
            return self._read_piece(self._embedded, size)
        if size == self.left or not self._decider.splits(self.request.mixture):
            return self._read_whole()
        self._embedded = self._embed()
        return None

    def _read_whole(self) -> Read:
        with self._routed():
            output = self._model(**self._inputs, use_cache=True, logits_to_keep=1)
        self.left = 0
        state = self._decider.continued()
        return Read(made_cache(output), state, output.logits[0, -1], self._position())

    def _embed(self) -> _Embedded:
        from transformers import DynamicCache

        handle = self._language.register_forward_pre_hook(_reached, with_kwargs=True)
        try:
            with self._routed():
                self._core(**self._inputs, use_cache=True)
        except _ReachedError as reached:
            arguments = {n: v for n, v in reached.arguments.items() if n not in (STATE, *CACHE_NAMES)}
        finally:
            handle.remove()
        state = self._model.cram.state
        return _Embedded(arguments, state, self._position(), DynamicCache(config=self._language.config))

    def _read_piece(self, embedded: _Embedded, size: int) -> Read | None:
        begin = len(self.ids) - self.left
        end = min(begin + size, len(self.ids))
        arguments = sliced(embedded.arguments, begin, end)
        arguments[cache_argument(self._language)] = embedded.cache
        with self._same_route(embedded.state):
            output = self._language(**arguments)
        self.left = len(self.ids) - end
        if self.left:
            return None
        logits = self._model.get_output_embeddings()(output.last_hidden_state[:, -1])[0]
        return Read(embedded.cache, self._decider.continued(), logits, embedded.position)

    def _routed(self) -> AbstractContextManager[Any]:
        if hasattr(self._core, "rope_deltas"):
            self._core.rope_deltas = None
        return self._decider.routed(self.request.prompt, self.request.mixture)

    def _same_route(self, state: ForwardState) -> AbstractContextManager[Any]:
        cram = self._model.cram
        if state.route is not None:
            return cram.fixed(state.route)
        return cram.disabled() if cram.num_experts else nullcontext()

    def _position(self) -> int:
        delta = getattr(self._core, "rope_deltas", None)
        return 0 if delta is None else int(delta.reshape(-1)[0])


def piece_tokens(prompt: int, piece: int) -> int:
    """Tokens of each piece of a prompt: equal pieces, each nearest to `piece` and below half more than it.

    A short last piece would cost almost as much as a whole one, because the weights are read for each.
    """
    return -(-prompt // max(1, round(prompt / piece)))


def _reached(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    raise _ReachedError(kwargs)


def sliced(arguments: Mapping[str, Any], begin: int, end: int) -> dict[str, Any]:
    """A language model's arguments for the tokens [begin, end) behind a cache of `begin` tokens.

    Raises:
        NotImplementedError: If an argument is a tensor of unknown meaning.
    """
    found = dict(arguments)
    for name, value in arguments.items():
        if name in PER_TOKEN and isinstance(value, Tensor):
            found[name] = value.narrow(PER_TOKEN[name], begin, end - begin)
        elif name == "attention_mask" and isinstance(value, Tensor):
            found[name] = value[:, :end]
        elif name == "deepstack_visual_embeds" and value is not None:
            found[name] = _visual_rows(value, arguments["visual_pos_masks"], begin, end)
        elif isinstance(value, Tensor):
            raise NotImplementedError(f"a prompt must have known inputs to be read in pieces, got {name}")
    return found


def _visual_rows(features: Sequence[Tensor], visual: Tensor, begin: int, end: int) -> list[Tensor] | None:
    """The features [N, H] of the visual tokens [begin, end); None without any."""
    before, inside = int(visual[:, :begin].sum()), int(visual[:, begin:end].sum())
    return [each[before : before + inside] for each in features] if inside else None
