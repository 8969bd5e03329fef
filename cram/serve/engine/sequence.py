"""One answer in the making: its tokens, its text as far as it is certain, and when it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cram.serve.request import Delta, Request, TokenLogprob

UNFINISHED = "�"  # what a decoder writes for bytes that are no whole character yet


class TextStream:
    """Turns token ids into text piece by piece.

    A piece is given out when more tokens can no longer change it. Only the tokens of the last pieces are
    decoded again, so that the cost of a token does not grow with the answer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._before = self._read = 0

    def add(self, token: int) -> str:
        """The text that one more token makes certain."""
        self._ids.append(token)
        return self._new(final=False)

    def close(self) -> str:
        """The rest of the text."""
        return self._new(final=True)

    def _new(self, final: bool) -> str:
        known = self._decode(self._ids[self._before : self._read])
        whole = self._decode(self._ids[self._before :])
        if len(whole) <= len(known) or (whole.endswith(UNFINISHED) and not final):
            return ""
        self._before, self._read = self._read, len(self._ids)
        return whole[len(known) :]

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class StopFilter:
    """Holds back text that may be the beginning of a stop string.

    Args:
        stops: The stop strings.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """The text that belongs to the answer for certain; `found` tells whether a stop string ended it."""
        self._held += text
        ends = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.found = True
            passed, self._held = self._held[: min(ends)], ""
            return passed
        kept = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - kept
        passed, self._held = self._held[:cut], self._held[cut:]
        return passed

    def close(self) -> str:
        """The held text, which turned out to be no stop string."""
        passed, self._held = self._held, ""
        return passed

    def _overlap(self, stop: str) -> int:
        """Length of the longest proper beginning of `stop` with which the held text ends."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)


class Answer:
    """One of the n answers of a request.

    Attributes:
        request: The request.
        index: Which of its answers.
        last: The newest token, which the next step reads.
        finished: Whether the answer has ended.
        position: What is added to the number of cached tokens for the position of the next one.
    """

    def __init__(
        self, request: Request, index: int, tokenizer: Any, ends: Sequence[int], limit: int, position: int
    ) -> None:
        self.request, self.index, self.position = request, index, position
        self.last, self.finished = 0, False
        self.token_ids: list[int] = []
        self._ends, self._limit = frozenset(ends), limit
        self._text, self._stop = TextStream(tokenizer), StopFilter(request.sampling.stop)
        self._begun = False
        self._generator: torch.Generator | None = None
        if request.sampling.temperature > 0:
            self._generator = torch.Generator()
            seed = request.sampling.seed
            if seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed((seed + index) % 2**63)

    def choose(self, scores: Tensor, greedy: int) -> int:
        """The next token from scores [V]; `greedy` is the index of the largest."""
        sampling = self.request.sampling
        if self._generator is None:
            return greedy
        below = scores.double().cpu() - scores.max().item()
        # The best score stays 0, so that no temperature is too small.
        probabilities = torch.softmax(below / sampling.temperature, dim=-1)
        order = probabilities.argsort(descending=True, stable=True)
        mass = probabilities[order].cumsum(0)
        kept = int((mass < sampling.top_p).sum()) + 1 if sampling.top_p < 1 else len(mass)
        drawn = torch.rand((), generator=self._generator, dtype=torch.float64) * mass[:kept][-1]
        return int(order[min(int((mass[:kept] <= drawn).sum()), kept - 1)])

    def take(self, token: int, scores: Tensor) -> Delta:
        """Append a token that was chosen from scores [V]; returns what is new."""
        self.last = token
        self.token_ids.append(token)
        logprobs = self._logprobs(token, scores)
        finish: str | None = None
        text = "" if token in self._ends else self._stop.add(self._text.add(token))
        if token in self._ends or self._stop.found:
            finish = "stop"
        elif len(self.token_ids) >= self._limit:
            finish = "length"
        if finish and not self._stop.found:
            text += self._stop.add(self._text.close())
            # The last characters may complete a stop string.
            text += "" if self._stop.found else self._stop.close()
            finish = "stop" if self._stop.found else finish
        if not self._begun:
            # Training puts a space between prompt and answer.
            text = text.lstrip()
            self._begun = bool(text)
        self.finished = finish is not None
        return Delta(self.index, text, (token,), logprobs, finish)

    def _logprobs(self, token: int, scores: Tensor) -> tuple[TokenLogprob, ...]:
        count = self.request.sampling.logprobs
        if count is None:
            return ()
        values = torch.log_softmax(scores.float(), dim=-1)
        best = values.topk(count)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return (TokenLogprob(token, float(values[token]), tuple(pairs)),)
