"""The routes that answer, list and observe."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any
from weakref import WeakValueDictionary

from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from cram.serve.engine.engine import Engine
from cram.serve.http.body import Bodies, Settings
from cram.serve.http.chat import ChatReader, ChatRequest
from cram.serve.http.errors import failed, failure
from cram.serve.http.fields import AUTOMATIC, BASE
from cram.serve.http.mailbox import Mailbox, Presence
from cram.serve.http.replies import Pieces, Replies, decided, event
from cram.serve.request import Collector, Delta, Failed, Prompt, QueueFullError, Request, Started

# Text that the model cannot read is refused before the tokenizer, which needs seconds per megabyte.
CHARACTERS_PER_TOKEN = 16


class Server:
    """The routes of one engine.

    Args:
        engine: The engine.
        processor: The model's processor.
        settings: Bounds and rights.
    """

    def __init__(self, engine: Engine, processor: Any, settings: Settings) -> None:
        self._engine, self._settings, self._bodies = engine, settings, Bodies(settings)
        self._pieces = Pieces(processor.tokenizer)
        longest = CHARACTERS_PER_TOKEN * engine.context
        # A prompt lives as long as its request.
        self._held: WeakValueDictionary[int, Prompt] = WeakValueDictionary()
        self._reader = ChatReader(processor, engine.cram.family, settings.max_pixels, longest)

    def routes(self) -> list[Route]:
        """The routes."""
        return [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.model, methods=["GET"]),
            Route("/v1/cram/route", self.route, methods=["POST"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
        ]

    async def chat(self, http: HttpRequest) -> Response:
        """Answers a conversation."""
        asked = await self._read(http)
        heard = Collector(asked.sampling.n)
        mailbox, replies = Mailbox(heard), Replies(asked.model, self._pieces)
        request = Request(asked.prompt, mailbox, asked.sampling, asked.mixture)
        # However this ends, nothing more is computed for the request; a stream takes that over.
        with ExitStack() as ending:
            self._engine.submit(request)
            ending.callback(request.cancel)
            async with Presence(http) as client:
                first = await client.unless_gone(mailbox.next())
                if isinstance(first, Failed):
                    return failed(first)
                if asked.stream:
                    chunks = self._chunks(asked.sampling.n, mailbox, replies, first, asked.usage)
                    return Stream(chunks, ending.pop_all())
                while not heard.done.is_set() or mailbox.waiting:
                    if isinstance(found := await client.unless_gone(mailbox.next()), Failed):
                        return failed(found)
                return JSONResponse(replies.whole(heard))

    async def _chunks(
        self, n: int, mailbox: Mailbox, replies: Replies, started: Started, counts: bool
    ) -> AsyncIterator[str]:
        for chunk in replies.first(started, n):
            yield event(chunk)
        left = n
        while left:
            found = await mailbox.next()
            if isinstance(found, Failed):
                yield event(failure(found.message, f"{found.fault}_error"))
                return
            assert isinstance(found, Delta)
            yield event(replies.piece(found))
            left -= found.finish is not None
        if counts:
            yield event(replies.last(mailbox.heard))
        yield event("[DONE]")

    async def route(self, http: HttpRequest) -> Response:
        """Which experts would answer a conversation."""
        asked = await self._read(http)
        async with Presence(http) as client:
            future = self._engine.decide(asked.prompt, asked.mixture)
            decision = await client.unless_gone(asyncio.wrap_future(future))
        return JSONResponse(decided(decision, self._engine.versions.current.names))

    async def models(self, http: HttpRequest) -> Response:
        """The automatic mixture, the base and each expert alone."""
        return JSONResponse({"object": "list", "data": [_listed(name) for name in self._names()]})

    async def model(self, http: HttpRequest) -> Response:
        """One of the models."""
        name = http.path_params["name"]
        if name not in self._names():
            raise HTTPException(404, f"model must be one that /v1/models lists, got {name!r:.100}")
        return JSONResponse(_listed(name))

    def _names(self) -> list[str]:
        return [AUTOMATIC, BASE, *(f"{AUTOMATIC}:{name}" for name in self._engine.versions.current.names)]

    async def health(self, http: HttpRequest) -> Response:
        """Whether the engine works."""
        alive = self._engine.alive
        waiting, flying = self._engine.load
        state = {"status": "ok" if alive else "stopped", "waiting": waiting, "in_flight": flying}
        return JSONResponse(state, 200 if alive else 503)

    async def metrics(self, http: HttpRequest) -> Response:
        """Counts for Prometheus."""
        return PlainTextResponse(self._engine.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _read(self, http: HttpRequest) -> ChatRequest:
        async with self._bodies.read(http) as body, Presence(http) as client:
            # Before images are decoded, which costs more than anything else that a refused request does.
            self._engine.check_room()
            asked: ChatRequest = await client.unless_gone(asyncio.to_thread(self._reader.read, body))
        held = sum(each.num_bytes for each in list(self._held.values()))
        if held and held + asked.prompt.num_bytes > self._settings.max_held:
            self._engine.metrics.rejected += 1
            raise QueueFullError("the requests that wait have too many pictures together")
        self._held[id(asked.prompt)] = asked.prompt
        return asked


class Stream(StreamingResponse):
    """An answer that is sent piece by piece.

    Args:
        chunks: Its pieces.
        ending: Is closed when the response ends, also where the client has gone before the first piece.
    """

    def __init__(self, chunks: AsyncIterator[str], ending: ExitStack) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(chunks, media_type="text/event-stream", headers=headers)
        self._ending = ending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer."""
        with self._ending:
            await super().__call__(scope, receive, send)


def _listed(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "cram"}
