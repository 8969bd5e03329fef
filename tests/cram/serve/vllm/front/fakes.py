"""A fake vLLM, and requests for it."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from typing import Any

import httpx

from tests.cram import factories

CHAT = "/v1/chat/completions"
ADMIN = {"authorization": "Bearer open"}
KEY_HEADER = {"authorization": "Bearer sesame"}


class FakeVllm:
    """Answers every request with what it was sent; a key is needed, as with `--api-key`."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Any]] = []
        self.app = None

    def verify_token(self, headers: Any) -> bool:
        """vLLM's own check."""
        return bool(headers.get("authorization") == KEY_HEADER["authorization"])

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            return
        body = (await receive())["body"]
        headers = dict(scope["headers"])
        if headers.get(b"authorization") != KEY_HEADER["authorization"].encode():
            status, content = 401, b'{"error": "Unauthorized"}'
        elif scope["path"] == "/v1/models":
            status, content = 200, b'{"object": "list", "data": [{"id": "base"}]}'
        else:
            assert not body or int(headers[b"content-length"]) == len(body)
            self.seen.append((scope["path"], json.loads(body) if body else None))
            status, content = 200, body
        start = {"type": "http.response.start", "status": status, "headers": [(b"x-own", b"1")]}
        await send(start)
        await send({"type": "http.response.body", "body": content})


def ask(app: Any, path: str, body: Any, headers: dict[str, str] | None = None, method: str = "POST") -> Any:
    """One request to an ASGI application."""

    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            content = None if body is None else json.dumps(body)
            kind = {"content-type": "application/json"} if body is not None else {}
            chosen = {**kind, **(KEY_HEADER if headers is None else headers)}
            return await client.request(method, path, content=content, headers=chosen)

    return asyncio.run(go())


def url_of(seed: int) -> str:
    """A picture as a data URL."""
    buffer = io.BytesIO()
    factories.image(seed).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def conversation(question: str, *seeds: int, **fields: Any) -> dict[str, Any]:
    """A chat request for the mixture."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url_of(k)}} for k in seeds]
    parts.append({"type": "text", "text": question})
    return {"model": "cram", "messages": [{"role": "user", "content": parts}], **fields}
