"""Answers in the form of OpenAI's chat completions."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from cram.serve.engine.sequence import UNFINISHED
from cram.serve.request import Collector, Decision, Delta, Started, TokenLogprob, as_dict


class Replies:
    """The replies to one request.

    Args:
        model: As the client named it.
        tokenizer: Writes tokens beside their log-probabilities.
    """

    def __init__(self, model: str, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, heard: Collector) -> dict[str, Any]:
        """The reply once every answer is finished."""
        assert heard.started is not None
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": self._logprobs(choice.logprobs),
                "finish_reason": choice.finish,
            }
            for index, choice in enumerate(heard.choices)
        ]
        return {
            **self._head,
            "object": "chat.completion",
            "choices": choices,
            "usage": usage(heard),
            "cram": as_dict(heard.started.decision),
        }

    def first(self, started: Started, n: int) -> list[dict[str, Any]]:
        """The chunks with which a stream begins."""
        head = {"role": "assistant", "content": ""}
        chunks = [self._chunk([self._choice(index, head, (), None)]) for index in range(n)]
        chunks[0]["cram"] = as_dict(started.decision)
        return chunks

    def piece(self, delta: Delta) -> dict[str, Any]:
        """The chunk of one new piece."""
        content = {"content": delta.text} if delta.text else {}
        return self._chunk([self._choice(delta.index, content, delta.logprobs, delta.finish)])

    def last(self, heard: Collector) -> dict[str, Any]:
        """The chunk with the token counts."""
        return {**self._chunk([]), "usage": usage(heard)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": choices}

    def _choice(
        self, index: int, delta: dict[str, str], logprobs: Sequence[TokenLogprob], finish: str | None
    ) -> dict[str, Any]:
        return {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(logprobs),
            "finish_reason": finish,
        }

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not logprobs:
            return None
        content = [
            {
                **self._token(each.token_id, each.logprob),
                "top_logprobs": [self._token(token, value) for token, value in each.top],
            }
            for each in logprobs
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
        # Bytes of a part of a character are not known here.
        known = None if UNFINISHED in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": known}


def usage(heard: Collector) -> dict[str, int]:
    """Token counts of prompt and answers."""
    assert heard.started is not None
    made = sum(len(choice.token_ids) for choice in heard.choices)
    prompt = heard.started.prompt_tokens
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


def event(value: Any) -> str:
    """One server-sent event."""
    return f"data: {value if isinstance(value, str) else json.dumps(value, allow_nan=False)}\n\n"


def decided(decision: Decision, names: Sequence[str]) -> dict[str, Any]:
    """The reply of a dry run; `experts` lists all experts in order."""
    return {"object": "cram.route", "experts": list(names), **as_dict(decision)}
