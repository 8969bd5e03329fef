"""The router in front of vLLM servers on other machines: `python -m cram.serve.vllm.front.proxy`.

The same middleware, with a small reverse proxy behind it. CLIP then needs no room beside the model, and one
router serves any number of servers behind one address.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterable
from contextlib import suppress
from typing import Any
from urllib.parse import quote

from cram.serve.vllm.front.middleware import MODELS, CramMiddleware, Receive, Scope, Send, refuse

CONNECT_S = 10.0
# Headers of one connection, which the next one makes by itself.
_OF_A_HOP = frozenset(
    (b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"proxy-connection")
)

Headers = Iterable[tuple[bytes, bytes]]


class Forward:
    """A reverse proxy that streams answers (ASGI).

    Args:
        upstream: Address of the servers, such as http://vllm:8000.
    """

    def __init__(self, upstream: str) -> None:
        import httpx

        timeout = httpx.Timeout(None, connect=CONNECT_S)
        self._errors = (httpx.HTTPError,)
        self._client = httpx.AsyncClient(timeout=timeout, trust_env=False)
        self._upstream, self._request = httpx.URL(upstream), httpx.Request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        if scope["type"] != "http":
            return
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        target = scope.get("raw_path") or quote(scope["path"]).encode()
        if scope["query_string"]:
            target += b"?" + scope["query_string"]
        request = self._made(scope["method"], target, scope["headers"], bytes(body))
        forward, left = (
            asyncio.ensure_future(each) for each in (self._forward(request, send), _left(receive))
        )
        try:
            await asyncio.wait((forward, left), return_when=asyncio.FIRST_COMPLETED)
        finally:
            left.cancel()
            # Nobody hears the rest: the connection closes, and the server stops computing.
            if not forward.done():
                forward.cancel()
        with suppress(asyncio.CancelledError):
            await forward

    def _made(self, method: str, target: bytes, headers: Headers, content: bytes = b"") -> Any:
        """A request for the servers, with no header that the client has not sent.

        httpx's client would add its own, and cookies that servers gave to others. A client that names no
        encoding may be unable to read any.
        """
        kept = _without(headers, _OF_A_HOP | {b"host", b"content-length"})
        if all(name != b"accept-encoding" for name, _ in kept):
            kept.append((b"accept-encoding", b"identity"))
        path = self._upstream.raw_path.rstrip(b"/") + b"/" + target.lstrip(b"/")
        return self._request(method, self._upstream.copy_with(raw_path=path), headers=kept, content=content)

    async def _forward(self, request: Any, send: Send) -> None:
        """Send a request on, and its answer back."""
        try:
            answer = await self._client.send(request, stream=True)
        except self._errors as error:
            await refuse(send, 502, f"the server behind the router must answer, got {type(error).__name__}")
            return
        try:
            headers = _without(answer.headers.raw, _OF_A_HOP)
            await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
            async for chunk in answer.aiter_raw():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            await answer.aclose()

    async def admits(self, scope: Scope) -> bool:
        """Whether the servers take the request's key; asked before any work is done for the request."""
        kept = [(name, value) for name, value in scope["headers"] if name.lower() == b"authorization"]
        try:
            answer = await self._client.send(self._made("GET", MODELS.encode(), kept))
        except self._errors:
            return False
        return bool(answer.status_code == 200)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._client.aclose()
        await send({"type": "lifespan.shutdown.complete"})


async def _left(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _without(headers: Headers, dropped: frozenset[bytes]) -> list[tuple[bytes, bytes]]:
    return [(name.lower(), value) for name, value in headers if name.lower() not in dropped]


def main() -> None:
    """Serve until a signal ends it."""
    import uvicorn

    parser = argparse.ArgumentParser(prog="python -m cram.serve.vllm.front.proxy", description=__doc__)
    parser.add_argument("--upstream", required=True, metavar="URL", help="address of the vLLM servers")
    parser.add_argument("--host", default="127.0.0.1", help="address (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8100, help="port (default: 8100)")
    text = "what the servers put before the names of adapters (Ray Serve LLM: base:)"
    parser.add_argument("--prefix", default="", help=text)
    given = parser.parse_args()
    app = CramMiddleware(Forward(given.upstream), prefix=given.prefix)
    uvicorn.run(app, host=given.host, port=given.port, lifespan="on", log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
