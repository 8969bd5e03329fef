"""Answers that are decoded together: one cache, one state, one token per answer and step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cram.model.attached import AttachedModel
from cram.model.cache import cache_argument
from cram.model.state import ForwardState
from cram.routing.query import Route
from cram.serve.engine.cache import RowCache
from cram.serve.engine.sequence import Answer
from cram.serve.request import Delta, Failed, Request

Heard = Callable[[Request, Delta | Failed], None]


class Batch:
    """Rows of one attached model that share a forward per step.

    Args:
        model: The attached model in evaluation mode.
        heard: Called with every piece of an answer.
        overrides_gating: See `Route`; the same for all rows.
    """

    def __init__(self, model: Any, heard: Heard, overrides_gating: bool) -> None:
        self._model, self._heard, self._overrides = model, heard, overrides_gating
        self._cram: AttachedModel = model.cram
        self._cache = RowCache()
        self._state: ForwardState | None = None
        self._cache_argument = cache_argument(model)
        self._three_axes = hasattr(model.get_submodule(self._cram.family.core), "rope_deltas")
        self.answers: list[Answer] = []

    def __len__(self) -> int:
        """Rows."""
        return len(self.answers)

    @property
    def num_bytes(self) -> int:
        """Bytes of the key-value allocation."""
        return self._cache.num_bytes

    @property
    def is_whole(self) -> bool:
        """Whether the answers can go on; see `RowCache.is_whole`."""
        return self._cache.is_whole

    def join(self, answers: Sequence[Answer], prefill: Any, state: ForwardState, logits: Tensor) -> None:
        """Answers of one request join. An error leaves those before as they were if `is_whole` stays True.

        Args:
            answers: The answers; each becomes a row.
            prefill: The cache of the prompt's one row.
            state: The state with which the cache continues.
            logits: Of the prompt's last token, [V].
        """
        scores = logits.float()
        greedy = int(scores.argmax())
        if not bool(torch.isfinite(logits).all()):
            self._fail(answers[0].request)
            return
        for answer in answers:
            self._take(answer, scores, greedy)
        going = [answer for answer in answers if not answer.finished]
        if not going:
            return
        rows = None
        if state.route is not None:
            rows = select(state, [0] * len(going), self._overrides)
            rows = rows if self._state is None else concatenate(self._state, rows)
        self._cache.join(prefill, len(going))
        self._state = rows
        self.answers += going
        self._continue()

    @torch.no_grad()
    def step(self) -> None:
        """One token for every answer; answers that end leave."""
        cache, answers, device = self._cache, self.answers, self._model.device
        cache.reserve_column()
        ids = torch.tensor([[answer.last] for answer in answers], device=device)
        places = [n + answer.position for n, answer in zip(cache.lengths(), answers, strict=True)]
        positions = torch.tensor(places, device=device)[:, None]
        output = self._model(
            input_ids=ids,
            attention_mask=cache.mask(device),
            position_ids=positions.expand(3, -1, -1) if self._three_axes else positions,
            use_cache=True,
            **{self._cache_argument: cache},
        )
        cache.advance()
        logits = output.logits[:, -1]
        scores = logits.float()
        finite = torch.isfinite(logits).all(-1).tolist()
        for row, (answer, greedy) in enumerate(zip(answers, scores.argmax(-1).tolist(), strict=True)):
            if answer.request.cancelled:
                continue
            if finite[row]:
                self._take(answer, scores[row], greedy)
            else:
                self._fail(answer.request)
        self.remove(lambda answer: answer.finished or answer.request.cancelled)

    def remove(self, gone: Callable[[Answer], bool]) -> None:
        """Drop the rows of some answers."""
        leaving = [row for row, answer in enumerate(self.answers) if gone(answer)]
        rows = list(range(len(self.answers)))
        for row in reversed(leaving):
            self._cache.drop(row)
            rows[row] = rows[-1]
            rows.pop()
        if not leaving:
            return
        self.answers = [self.answers[row] for row in rows]
        if self._state is not None:
            self._state = select(self._state, rows, self._overrides) if rows else None
        self._continue()

    def _continue(self) -> None:
        """The next forward over the cache uses the state of the rows as they are."""
        if self._state is not None:
            self._cram.hooks.adopt(self._cache, self._state)

    def _take(self, answer: Answer, scores: Tensor, greedy: int) -> None:
        self._heard(answer.request, answer.take(answer.choose(scores, greedy), scores))

    def _fail(self, request: Request) -> None:
        """A request whose numbers have broken down takes no neighbour with it."""
        self._heard(request, Failed("the model's output for this request is not finite", "server"))
        request.cancel()


def _joined(
    gates: Tensor, features: Tensor | None, memory: dict[str, Tensor], overrides: bool
) -> ForwardState:
    route = Route(gates, features=features, overrides_gating=overrides)
    return ForwardState(route, gates.device, memory=memory, decoding=True).repeated()


def _gates(state: ForwardState) -> Tensor:
    """Gates [L, B, E] on the model's device."""
    assert state.gates is not None
    return torch.stack(state.gates)


def select(state: ForwardState, rows: list[int], overrides_gating: bool) -> ForwardState:
    """The state of some rows of a decoding batch; a row may be named more than once.

    Args:
        state: Gates [L, B, E], features [B, F] and memory tensors with B rows each.
        rows: Indices of the rows.
        overrides_gating: See `Route`.
    """
    gates, features = _gates(state), state.features
    index = torch.tensor(rows, dtype=torch.int64, device=gates.device)
    memory = {name: tensor[index.to(tensor.device)] for name, tensor in state.memory.items()}
    return _joined(gates[:, index], None if features is None else features[index], memory, overrides_gating)


def concatenate(one: ForwardState, other: ForwardState) -> ForwardState:
    """The rows of one state and behind them those of another.

    Raises:
        ValueError: If only one of the states overrides gatings, or their memories hold different tensors.
    """
    if one.overrides_gating != other.overrides_gating or one.memory.keys() != other.memory.keys():
        raise ValueError("states must come from prefills of one kind, got an overriding and an automatic one")
    features = None
    if one.features is not None and other.features is not None:
        features = torch.cat([one.features, other.features])
    memory = {name: torch.cat([tensor, other.memory[name]]) for name, tensor in one.memory.items()}
    return _joined(torch.cat([_gates(one), _gates(other)], dim=1), features, memory, one.overrides_gating)
