"""The reverse proxy alone: the servers hear of a client that leaves."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from cram.serve.vllm.front.proxy import Forward


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
        transport = httpx.ASGITransport(server)
        forward._client = httpx.AsyncClient(transport=transport, base_url="http://upstream")

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
