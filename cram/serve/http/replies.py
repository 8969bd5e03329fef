"""Answers in the form of OpenAI's chat completions."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from cram.serve.request import Collector, Decision, Delta, Started, TokenLogprob, as_dict

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Pieces:
    """The bytes of single tokens, from the pieces of the vocabulary.

    The bytes of all tokens of an answer in a row are its text, behind the space that the first token may
    begin with. A decoder would drop that space from every token that is decoded alone.

    Args:
        tokenizer: Its decoder, or that of its slow form, tells how bytes are written in pieces.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = {int(k): str(token) for k, token in tokenizer.added_tokens_decoder.items()}
        self._alphabet: dict[str, int] = {}
        self._replaced: list[tuple[str, str]] = []
        self._fallback = False
        for step in _steps(_decoder(tokenizer)):
            kind, pattern = step["type"], step.get("pattern")
            if kind == "ByteLevel":
                self._alphabet = byte_alphabet()
            elif kind == "ByteFallback":
                self._fallback = True
            elif kind == "Metaspace":
                self._replaced.append((step["replacement"], " "))
            elif kind == "Replace" and isinstance(pattern, dict) and "String" in pattern:
                self._replaced.append((pattern["String"], step["content"]))
        self._known = bool(self._alphabet or self._fallback or self._replaced)

    def of(self, token: int) -> bytes:
        """The bytes of a token; those of its name for a special one, none for an unused id."""
        if token in self._added:
            return self._added[token].encode()
        if not self._known:
            text: str = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
            return text.encode()
        piece: str = self._tokenizer.convert_ids_to_tokens(token) or ""
        if self._alphabet:
            whole = all(each in self._alphabet for each in piece)
            return bytes(self._alphabet[each] for each in piece) if whole else piece.encode()
        if self._fallback and (byte := _BYTE.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        for old, new in self._replaced:
            piece = piece.replace(old, new)
        return piece.encode()


def _decoder(tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer's decoder consists of, as `tokenizers` writes it to a file."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is not None:
        described: dict[str, Any] = json.loads(decoder.__getstate__())
        return described
    if hasattr(tokenizer, "byte_decoder"):
        return {"type": "ByteLevel"}
    if hasattr(tokenizer, "sp_model"):
        return {
            "type": "Sequence",
            "decoders": [{"type": "Metaspace", "replacement": "▁"}, {"type": "ByteFallback"}],
        }
    return {"type": "unknown"}


def _steps(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if decoder["type"] == "Sequence":
        for each in decoder["decoders"]:
            yield from _steps(each)
    else:
        yield decoder


def byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level vocabularies: what is not printable in Latin-1 comes from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    shifted = {chr(0x100 + place): byte for place, byte in enumerate(others)}
    return {**{chr(byte): byte for byte in plain}, **shifted}


class Replies:
    """The replies to one request.

    Args:
        model: As the client named it.
        pieces: Writes tokens beside their log-probabilities.
    """

    def __init__(self, model: str, pieces: Pieces) -> None:
        self._pieces = pieces
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
        content = self._pieces.of(token)
        return {"token": content.decode(errors="replace"), "logprob": logprob, "bytes": list(content)}


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
