"""The reverse proxy alone: the servers hear of a client that leaves."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import JSONResponse
from starlette.routing import Route

from cram.serve.vllm.front.middleware import CramMiddleware
from cram.serve.vllm.front.proxy import Forward
from tests.cram.serve.vllm.front.fakes import ask


def test_a_client_that_leaves_stops_the_server() -> None:
    heard: list[str] = []

    async def server(scope: Any, receive: Any, send: Any) -> None:
        heard.append("asked")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            heard.append("stopped")
            raise

    async def go() -> None:
        forward = Forward("http://upstream")
        forward._client = httpx.AsyncClient(transport=httpx.ASGITransport(server))

        async def receive() -> Any:
            if not heard:
                return {"type": "http.request", "body": b"{}", "more_body": False}
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            raise AssertionError("nothing must be sent to a client that has gone")

        scope = {"type": "http", "method": "POST", "path": "/x", "query_string": b"", "headers": []}
        await asyncio.wait_for(forward(scope, once_asked(receive, heard), send), 10)

    asyncio.run(go())
    assert heard == ["asked", "stopped"]


OWN = [(b"accept-encoding", b"br"), (b"accept", b"text/x"), (b"user-agent", b"me"), (b"x-two", b"1")]


@pytest.mark.parametrize("sent", [[], OWN + [(b"x-two", b"2")]])
def test_the_server_gets_the_headers_of_the_client_and_no_others(sent: list[tuple[bytes, bytes]]) -> None:
    seen: list[tuple[str, list[tuple[bytes, bytes]]]] = []

    async def server(scope: Any, receive: Any, send: Any) -> None:
        query = f"?{scope['query_string'].decode()}" if scope["query_string"] else ""
        seen.append((scope["raw_path"].decode() + query, scope["headers"]))
        headers = [(b"set-cookie", b"a=b")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"{}"})

    async def go() -> None:
        forward = Forward("http://upstream/of/")
        forward._client = httpx.AsyncClient(transport=httpx.ASGITransport(server))
        parts = [{"type": "http.request", "body": b"", "more_body": False}]

        async def receive() -> Any:
            return parts.pop() if parts else await asyncio.sleep(60)

        async def send(message: Any) -> None:
            pass

        scope: dict[str, Any] = {"type": "http", "headers": [(b"host", b"x"), (b"te", b"trailers"), *sent]}
        assert await forward.admits(scope)
        await forward({**scope, "method": "GET", "path": "/a b", "query_string": b"c=%20"}, receive, send)

    asyncio.run(go())
    wanted = sent or [(b"accept-encoding", b"identity")]
    asked, forwarded = seen
    assert asked == ("/of/v1/models", [(b"host", b"upstream"), (b"accept-encoding", b"identity")])
    assert forwarded == ("/of/a%20b?c=%20", [(b"host", b"upstream"), *wanted])


def test_the_list_of_models_is_read_also_from_a_server_that_compresses() -> None:
    async def listing(request: Any) -> Any:
        return JSONResponse({"object": "list", "data": [{"id": "base" * 200}]})

    server = GZipMiddleware(Starlette(routes=[Route("/v1/models", listing)]), minimum_size=100)
    forward = Forward("http://upstream")
    forward._client = httpx.AsyncClient(transport=httpx.ASGITransport(server))
    router: Any = SimpleNamespace(names=["old"])
    for headers in ({}, {"accept-encoding": "gzip"}):
        reply = ask(CramMiddleware(forward, router), "/v1/models", None, headers, "GET")
        assert [each["id"] for each in reply.json()["data"]] == ["cram", "cram:old", "base" * 200]
        assert "content-encoding" not in reply.headers


def once_asked(receive: Any, heard: list[str]) -> Any:
    """The body at once; the client leaves when the server has been asked."""
    given: list[bool] = []

    async def later() -> Any:
        if not given:
            given.append(True)
            return await receive()
        while not heard:
            await asyncio.sleep(0.01)
        return await receive()

    return later
