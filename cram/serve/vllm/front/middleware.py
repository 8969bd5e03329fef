"""Gates for requests that bring none: a middleware of `vllm serve --middleware`, or of the proxy beside it.

A request for the model `cram` gets the name of its group's adapter as model and its gates in `vllm_xargs`.
The answer's headers say which. `cram:expert` and `lora` name the experts instead. Chats with the base or
a group get the special tokens of training. All else passes untouched.

vLLM puts such a middleware outside its own authentication. So the key is checked here first: a request that
will be refused costs no pass of CLIP.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from types import NoneType
from typing import Any

from starlette.datastructures import Headers

from cram.console import KNOWN_ERRORS
from cram.serve.vllm.front.conversation import (
    AUTOMATIC,
    CHAT,
    COMPLETIONS,
    addressed,
    check_options,
    named_mixture,
    read_chat,
    read_completion,
)
from cram.serve.vllm.front.replace import ADMIN, Replacer, check_served
from cram.serve.vllm.front.routing import BundleRouter, Choice
from cram.serve.vllm.group import ADAPTER, KEY, encode

BASE = "base"
MODELS = "/v1/models"
MAX_BODY = 64 << 20
BUNDLE, EXPORT, CLIP, DEVICE = "CRAM_BUNDLE", "CRAM_EXPORT", "CRAM_CLIP", "CRAM_DEVICE"

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class CramMiddleware:
    """The middleware.

    Args:
        app: The application behind it.
        router: By default that of `$CRAM_BUNDLE`, whose adapters are in `$CRAM_EXPORT`; loaded at the start.
        prefix: What the application puts before the names of adapters.
    """

    def __init__(self, app: App, router: BundleRouter | None = None, prefix: str = "") -> None:
        self.app = app
        self._router, self._prefix = router, prefix
        self._replacer = Replacer()
        self._turn = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "lifespan":
            await self._start(scope, receive, send)
            return
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif scope["method"] == "GET" and path == MODELS:
            await self._models(scope, receive, send)
        elif scope["method"] == "POST" and path == ADMIN:
            await self._replace(scope, receive, send)
        elif scope["method"] == "POST" and _is_json(scope) and await self._admitted(scope):
            await self._post(path, scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _start(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Load the router before the server listens; a bundle that cannot be served stops the start."""
        try:
            if self._router is None:
                router = await asyncio.to_thread(load_router)
                # A proxy has no base.
                if "app" in scope:
                    await asyncio.to_thread(check_served, scope, Path(os.environ[BUNDLE]))
                self._router = router
        except KNOWN_ERRORS as error:
            await receive()
            await send({"type": "lifespan.startup.failed", "message": f"cram: {error}"})
            return
        await self.app(scope, receive, send)

    async def _admitted(self, scope: Scope) -> bool:
        """Whether the application will take the request's key; it answers those that it refuses itself."""
        layer: Any = self.app
        while layer is not None:
            if hasattr(layer, "verify_token"):
                return bool(layer.verify_token(Headers(scope=scope)))
            if hasattr(layer, "admits"):
                return bool(await layer.admits(scope))
            layer = getattr(layer, "app", None)
        return True

    async def _post(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _whole_body(receive)
        if body is None:
            await refuse(send, 413, f"the body must have at most {MAX_BODY} bytes, got more")
            return
        try:
            data = json.loads(body)
        except (ValueError, RecursionError):
            data = None
        asked, tags = data, []
        try:
            if isinstance(data, dict) and addressed(data.get("model")):
                choice = await self._chosen(path, data)
                asked, tags = rewritten(data, choice, self._prefix), tagged(choice)
            if _of_group(asked, self._prefix):
                check_options(asked)
        except ValueError as error:
            await refuse(send, 400, f"cram: {error}")
            return
        if path == CHAT:
            asked = as_trained(asked, self._prefix)
        if asked is not data:
            body = json.dumps(asked).encode()
            kept = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
            scope = {**scope, "headers": [*kept, (b"content-length", str(len(body)).encode())]}
        await self.app(scope, _replayed(body, receive), _with_headers(send, tags))

    async def _chosen(self, path: str, data: dict[str, Any]) -> Choice | None:
        """Who answers; None for the base model."""
        if path not in (CHAT, COMPLETIONS):
            raise ValueError(
                f"the model {AUTOMATIC!r} must be asked through {CHAT} or {COMPLETIONS}, got {path}"
            )
        extra = data.get("vllm_xargs")
        if not isinstance(extra, dict | NoneType):
            raise ValueError(f"vllm_xargs must be an object, got {type(extra).__name__}")
        if KEY in (extra or {}):
            raise ValueError(
                f"{KEY!r} must come with a group's own name as model, got {data['model']!r:.100}"
            )
        router = self.router
        mixture = named_mixture(data)
        if mixture is not None:
            return router.mixture(mixture)
        asked = read_chat(data) if path == CHAT else read_completion(data, router.family)
        async with self._turn:
            return await asyncio.to_thread(router.automatic, asked)

    @property
    def router(self) -> BundleRouter:
        """The router of the moment.

        Raises:
            RuntimeError: If the server has not started.
        """
        if self._router is None:
            raise RuntimeError("cram: the middleware must be started before it is asked, got no router")
        return self._router

    async def _models(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application's list of models, with the mixture and each expert in front."""
        start: Message = {}
        body = bytearray()

        async def collect(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
            else:
                body.extend(message.get("body", b""))

        plain = [(name, value) for name, value in scope["headers"] if name != b"accept-encoding"]
        plain.append((b"accept-encoding", b"identity"))
        await self.app({**scope, "headers": plain}, receive, collect)
        content = bytes(body)
        if start["status"] == 200 and self._router is not None:
            listed = json.loads(content)
            names = [AUTOMATIC, *(f"{AUTOMATIC}:{name}" for name in self._router.names)]
            own = [{"id": name, "object": "model", "created": 0, "owned_by": "cram"} for name in names]
            content = json.dumps({**listed, "data": [*own, *listed["data"]]}).encode()
        headers = [(name, value) for name, value in start["headers"] if name.lower() != b"content-length"]
        start["headers"] = [*headers, (b"content-length", str(len(content)).encode())]
        await send(start)
        await send({"type": "http.response.body", "body": content})

    async def _replace(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Make another bundle current: a request gets the old adapters or the new ones."""
        status, answer, made = await self._replacer.replace(scope, await _whole_body(receive), self._router)
        if made is None:
            await refuse(send, status, str(answer))
            return
        self._router = made
        await reply(send, status, answer)


def load_router() -> BundleRouter:
    """The router that the environment names.

    Raises:
        ValueError: If a variable is missing, or as `BundleRouter.load`.
    """
    if missing := [name for name in (BUNDLE, EXPORT) if not os.environ.get(name)]:
        raise ValueError(f"{missing[0]} must name a folder, got none; `cram serve --engine vllm` sets it")
    clip, device = os.environ.get(CLIP) or None, os.environ.get(DEVICE) or "cpu"
    return BundleRouter.load(Path(os.environ[BUNDLE]), Path(os.environ[EXPORT]), clip, device)


def rewritten(data: dict[str, Any], choice: Choice | None, prefix: str = "") -> dict[str, Any]:
    """The request as vLLM takes it."""
    kept = {name: value for name, value in data.items() if name != "lora"}
    if choice is None:
        return {**kept, "model": BASE}
    extra = {**(data.get("vllm_xargs") or {}), KEY: encode(choice.gates)}
    return {**kept, "model": prefix + choice.adapter.name, "vllm_xargs": extra}


def as_trained(asked: Any, prefix: str = "") -> Any:
    """A chat with the base or a group, with the special tokens that the model's processor puts before it.

    Experts are trained behind them. vLLM leaves them out unless the chat template writes them, which LLaVA's
    does not.
    """
    if _of_group(asked, prefix) or (isinstance(asked, dict) and asked.get("model") == BASE):
        return {"add_special_tokens": True, **asked}
    return asked


def _of_group(asked: Any, prefix: str) -> bool:
    """Whether a request's model is the adapter of a group."""
    model = asked.get("model") if isinstance(asked, dict) else None
    return isinstance(model, str) and model.startswith(prefix + ADAPTER)


def tagged(choice: Choice | None) -> list[tuple[bytes, bytes]]:
    """Headers that say who answers."""
    if choice is None:
        return [(b"x-cram-mode", b"base")]
    means = {name: round(mean, 4) for name, mean in choice.means().items()}
    return [
        (b"x-cram-mode", b"automatic" if choice.automatic else b"mixture"),
        (b"x-cram-group", str(choice.adapter.index).encode()),
        (b"x-cram-adapter", choice.adapter.name.encode()),
        (b"x-cram-gates", json.dumps(means).encode()),
    ]


async def reply(send: Send, status: int, answer: Any) -> None:
    """Send a JSON answer."""
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(answer).encode()})


async def refuse(send: Send, status: int, text: str) -> None:
    """Send an error in OpenAI's form."""
    error = {"message": text, "type": "BadRequestError", "param": None, "code": status}
    await reply(send, status, {"error": error})


def _is_json(scope: Scope) -> bool:
    kind = Headers(scope=scope).get("content-type", "")
    return kind.split(";")[0].strip().lower() == "application/json"


async def _whole_body(receive: Receive) -> bytes | None:
    """The body, or None if it is too large or the client has gone."""
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > MAX_BODY:
            return None
    return bytes(body)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body once, then whatever comes: vLLM must hear of a client that leaves, to stop computing."""
    waiting = [body]

    async def replay() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return replay


def _with_headers(send: Send, tags: list[tuple[bytes, bytes]]) -> Send:
    async def tag(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *tags]}
        await send(message)

    return tag
