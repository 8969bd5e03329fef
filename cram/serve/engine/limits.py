"""Bounds of the engine, and which requests they admit."""

from __future__ import annotations

from dataclasses import dataclass

from cram.serve.request import Request, RequestError, Sampling


@dataclass(frozen=True)
class Limits:
    """Bounds of the engine.

    Attributes:
        rows: Answers in flight at most; a request of n answers takes n.
        waiting: Requests that wait at most.
        tokens: Tokens of an answer where the request names no number, and at most.
        context: Tokens of prompt and answer together; None for the model's own limit.
        piece: About how many tokens of a prompt are read between two steps; see `prefill.piece_tokens`.
    """

    rows: int = 32
    waiting: int = 128
    tokens: int = 1024
    context: int | None = None
    piece: int = 96

    def check(self, request: Request) -> None:
        """Refuse a request that asks for more than there is.

        Raises:
            RequestError: If it does.
        """
        if request.sampling.n > self.rows:
            raise RequestError(f"n must be at most {self.rows}, got {request.sampling.n}")
        if (request.sampling.max_tokens or 1) > self.tokens:
            raise RequestError(f"max_tokens must be at most {self.tokens}, got {request.sampling.max_tokens}")

    def answer_tokens(self, sampling: Sampling, prompt: int, context: int) -> int:
        """Tokens of an answer at most.

        Args:
            sampling: What the request asks for.
            prompt: Tokens of the prompt.
            context: Tokens of prompt and answer together.

        Raises:
            RequestError: If the context has no room for what is asked.
        """
        asked, left = sampling.max_tokens, context - prompt
        if left < (asked or 1):
            raise RequestError(
                f"prompt and answer must fit into {context} tokens, got a prompt of {prompt} "
                f"and max_tokens of {asked or 1}"
            )
        return asked or min(self.tokens, left)
