"""The HTTP server: OpenAI's chat completions over an engine, and what belongs to a mixture of experts."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from cram.bundle.bundle import load
from cram.serve.chat import AUTOMATIC, BASE, ChatReader, ChatRequest
from cram.serve.engine import Engine
from cram.serve.replies import Replies, decided, event, failure
from cram.serve.request import Collector, Delta, Event, Failed, QueueFullError, Request, RequestError, Started
from cram.serve.versions import Version

LOG = logging.getLogger("cram.serve")
BUNDLE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
RETRY_S = "1"


@dataclass(frozen=True)
class Settings:
    """Bounds and rights of the HTTP server.

    Attributes:
        max_body: Bytes of a request at most.
        max_pixels: Pixels of an image at most.
        body_s: Seconds within which a request must have been sent.
        drain_s: Seconds that a stop waits for the answers in flight.
        admin_token: What opens the admin routes; None closes them.
        bundles: The folder whose bundles may be loaded; None for no changes.
    """

    max_body: int = 16 << 20
    max_pixels: int = 4096 * 4096
    body_s: float = 30.0
    drain_s: float = 30.0
    admin_token: str | None = None
    bundles: Path | None = None


def create_app(engine: Engine, model: Any, processor: Any, settings: Settings | None = None) -> Starlette:
    """The application; it starts the engine and stops it.

    Args:
        engine: An engine that has not been started.
        model: Its model.
        processor: The model's processor.
        settings: Bounds and rights.
    """
    server = Server(engine, model, processor, settings or Settings())

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.stop, server.settings.drain_s)

    routes = [
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
        Route("/v1/models", server.models, methods=["GET"]),
        Route("/v1/cram/route", server.route, methods=["POST"]),
        Route("/v1/cram/bundle", server.bundle, methods=["POST"]),
        Route("/v1/cram/rollback", server.rollback, methods=["POST"]),
        Route("/health", server.health, methods=["GET"]),
        Route("/metrics", server.metrics, methods=["GET"]),
    ]
    handlers: Any = {
        RequestError: _refused,
        QueueFullError: _busy,
        HTTPException: _http_error,
        ClientDisconnect: _gone,
        Exception: _server_error,
    }
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)


class Server:
    """The routes.

    Attributes:
        settings: Bounds and rights.
    """

    def __init__(self, engine: Engine, model: Any, processor: Any, settings: Settings) -> None:
        self.settings = settings
        self._engine, self._model = engine, model
        self._tokenizer = processor.tokenizer
        self._reader = ChatReader(processor, engine.cram.family, settings.max_pixels)

    async def chat(self, http: HttpRequest) -> Response:
        """Answers a conversation."""
        asked = await self._read(http)
        heard = Collector(asked.sampling.n)
        mailbox = Mailbox(heard)
        request = Request(asked.prompt, mailbox, asked.sampling, asked.mixture)
        self._engine.submit(request)
        replies = Replies(asked.model, self._tokenizer)
        try:
            first = await mailbox.next_unless(http)
            if isinstance(first, Failed):
                return _failed(first)
            if asked.stream:
                assert isinstance(first, Started)
                chunks = self._chunks(request, mailbox, replies, first, asked.usage)
                headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
                return StreamingResponse(chunks, media_type="text/event-stream", headers=headers)
            while not heard.done.is_set() or mailbox.waiting:
                if isinstance(found := await mailbox.next_unless(http), Failed):
                    return _failed(found)
            return JSONResponse(replies.whole(heard))
        except (ClientDisconnect, asyncio.CancelledError):
            request.cancel()
            raise

    async def _chunks(
        self, request: Request, mailbox: Mailbox, replies: Replies, started: Started, counts: bool
    ) -> AsyncIterator[str]:
        try:
            for chunk in replies.first(started, request.sampling.n):
                yield event(chunk)
            left = request.sampling.n
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
        finally:
            # Also where the client has gone: the engine then computes nothing more for it.
            request.cancel()

    async def route(self, http: HttpRequest) -> Response:
        """Which experts would answer a conversation."""
        asked = await self._read(http)
        decision = await _result(self._engine.decide(asked.prompt, asked.mixture))
        return JSONResponse(decided(decision, self._engine.versions.current.names))

    async def models(self, http: HttpRequest) -> Response:
        """The automatic mixture, the base and each expert alone."""
        experts = [f"{AUTOMATIC}:{name}" for name in self._engine.versions.current.names]
        listed = [
            {"id": name, "object": "model", "created": 0, "owned_by": "cram"}
            for name in (AUTOMATIC, BASE, *experts)
        ]
        return JSONResponse({"object": "list", "data": listed})

    async def health(self, http: HttpRequest) -> Response:
        """Whether the engine works."""
        alive = self._engine.alive
        waiting, flying = self._engine.load
        state = {"status": "ok" if alive else "stopped", "waiting": waiting, "in_flight": flying}
        return JSONResponse(state, 200 if alive else 503)

    async def metrics(self, http: HttpRequest) -> Response:
        """Counts for Prometheus."""
        return PlainTextResponse(self._engine.metrics.text(), media_type="text/plain; version=0.0.4")

    async def bundle(self, http: HttpRequest) -> Response:
        """Makes a bundle of the bundle folder current; the body is {"name": folder}."""
        self._admit(http)
        body = await self._body(http)
        name = body.get("name") if isinstance(body, dict) and body.keys() == {"name"} else None
        root = self.settings.bundles
        if root is None:
            raise RequestError("the server must be started with a bundle folder, got none")
        if not isinstance(name, str) or not BUNDLE_NAME.fullmatch(name):
            raise RequestError('the body must be {"name": the name of a bundle}, got another')
        folder = root / name
        if folder.is_symlink() or not folder.is_dir():
            raise RequestError(f"name must be that of a folder among the bundles, got {name!r}")
        try:
            made = await _result(self._engine.replace(lambda: load(self._model, folder)))
        except (ValueError, OSError, RuntimeError, SafetensorError) as error:
            LOG.error("bundle %s was refused: %s", name, error)
            raise RequestError(_without_paths(f"bundle {name} was refused: {error}", root)) from None
        LOG.warning("bundle %s is current, version %d", name, made.number)
        return self._current(made)

    async def rollback(self, http: HttpRequest) -> Response:
        """Makes the experts before the current ones current again."""
        self._admit(http)
        try:
            return self._current(await _result(self._engine.roll_back()))
        except ValueError as error:
            raise RequestError(str(error)) from None

    def _current(self, version: Version) -> Response:
        reply = {"object": "cram.bundle", "version": version.number, "experts": list(version.names)}
        return JSONResponse(reply)

    def _admit(self, http: HttpRequest) -> None:
        """Refuse whoever has not the admin token; without one the admin routes do not exist."""
        token = self.settings.admin_token
        if token is None:
            raise HTTPException(404)
        given = http.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise HTTPException(401)

    async def _read(self, http: HttpRequest) -> ChatRequest:
        body = await self._body(http)
        return await asyncio.to_thread(self._reader.read, body)

    async def _body(self, http: HttpRequest) -> Any:
        """The JSON body, within the bounds of size and time."""
        # A page of another site can send no JSON without asking first, and is never allowed to.
        if http.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise HTTPException(415)
        content = bytearray()
        try:
            async with asyncio.timeout(self.settings.body_s):
                async for chunk in http.stream():
                    content += chunk
                    if len(content) > self.settings.max_body:
                        raise HTTPException(413)
        except TimeoutError:
            raise HTTPException(408) from None
        try:
            return json.loads(content, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            raise RequestError("the body must be JSON, got other text") from None


class Mailbox:
    """Carries a request's events from the engine's thread to the event loop.

    Attributes:
        heard: Puts the answers together.
    """

    def __init__(self, heard: Collector) -> None:
        self.heard = heard
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def __call__(self, event: Event) -> None:
        """Take an event, in the engine's thread; after the loop's end nobody listens any more."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._put, event)

    @property
    def waiting(self) -> bool:
        """Whether an event has not been fetched."""
        return not self._events.empty()

    def _put(self, event: Event) -> None:
        self.heard(event)
        self._events.put_nowait(event)

    async def next(self) -> Event:
        """The next event."""
        return await self._events.get()

    async def next_unless(self, http: HttpRequest) -> Event:
        """The next event.

        Raises:
            ClientDisconnect: If the client goes first.
        """
        fetched = asyncio.ensure_future(self._events.get())
        gone = asyncio.ensure_future(http.receive())
        try:
            await asyncio.wait({fetched, gone}, return_when=asyncio.FIRST_COMPLETED)
            if fetched.done():
                return fetched.result()
            raise ClientDisconnect
        finally:
            fetched.cancel()
            gone.cancel()


async def _result(future: Future[Any]) -> Any:
    return await asyncio.wrap_future(future)


def _no_constant(name: str) -> Any:
    raise ValueError(f"numbers must be finite, got {name}")


def _without_paths(text: str, root: Path) -> str:
    """The text with the server's folders left out."""
    for folder in (root, root.resolve()):
        text = text.replace(f"{folder}/", "")
    return text


def _failed(event: Failed) -> Response:
    fault = event.fault == "request"
    kind = "invalid_request_error" if fault else "server_error"
    return JSONResponse(failure(event.message, kind), 400 if fault else 500)


async def _refused(http: HttpRequest, error: Exception) -> Response:
    return JSONResponse(failure(str(error), "invalid_request_error"), 400)


async def _busy(http: HttpRequest, error: Exception) -> Response:
    return JSONResponse(failure(str(error), "rate_limit_error"), 429, {"Retry-After": RETRY_S})


async def _http_error(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    reply = failure(error.detail, "invalid_request_error")
    return JSONResponse(reply, error.status_code, error.headers)


async def _gone(http: HttpRequest, error: Exception) -> Response:
    """Nobody reads this reply; its status marks the log line of a client that left."""
    return Response(status_code=499)


async def _server_error(http: HttpRequest, error: Exception) -> Response:
    return JSONResponse(failure("the server failed", "server_error"), 500)
