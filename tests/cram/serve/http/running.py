"""A server on a socket, and a client that knows nothing of this package."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cram.serve.bundles import Bundles
from cram.serve.engine.engine import Engine
from cram.serve.engine.limits import Limits
from tests.cram.factories import image, routed_llava

pytest.importorskip("uvicorn", reason="the server needs the extra `serve`")
pytest.importorskip("starlette", reason="the server needs the extra `serve`")


def data_url(seed: int, kind: str = "PNG") -> str:
    """A test picture as a data URL."""
    buffer = io.BytesIO()
    image(seed).save(buffer, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def messages(question: str, *seeds: int) -> list[dict[str, Any]]:
    """One user message about some pictures."""
    pictures = [{"type": "image_url", "image_url": {"url": data_url(seed)}} for seed in seeds]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": question}]}]


class Client:
    """Sends requests to a running server."""

    def __init__(self, base: str) -> None:
        self.base = base

    def send(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON (or text) and headers of a reply; a body makes it a POST."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.base + path, data, {"Content-Type": "application/json", **(headers or {})}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                status, content, got = reply.status, reply.read(), dict(reply.headers)
        except urllib.error.HTTPError as error:
            with error:
                status, content, got = error.code, error.read(), dict(error.headers)
        text = content.decode()
        return status, json.loads(text) if "json" in got.get("content-type", "") else text, got

    def chat(self, **body: Any) -> tuple[int, Any]:
        """Status and JSON of a chat completion."""
        status, reply, _ = self.send("/v1/chat/completions", {"model": "cram", "max_tokens": 8, **body})
        return status, reply


class Running(NamedTuple):
    """A running server: a client of it, its model, the model's processor, its engine."""

    client: Client
    model: Any
    processor: Any
    engine: Engine


@contextmanager
def serving(
    limits: Limits | None = None,
    settings: Any = None,
    bundles: Path | None = None,
    examples: Sequence[Any] = (),
    made: tuple[Any, Any] | None = None,
    gate_floor: float = 0.0,
    drain_s: float = 20,
) -> Iterator[Running]:
    """A server on a free port of the loopback.

    Args:
        limits: Bounds of the engine.
        settings: Bounds of the HTTP server.
        bundles: Folder of bundles that may be loaded.
        examples: Questions that the page offers.
        made: Model and processor; by default the routed LLaVA.
        gate_floor: See `Engine`.
        drain_s: See `web_server`.
    """
    from cram.serve.http.app import create_app
    from cram.serve.http.connection import web_server

    model, processor = made or routed_llava()[:2]
    engine = Engine(model, processor, limits, gate_floor)
    app = create_app(engine, processor, settings, Bundles(engine, model, bundles), examples)
    server = web_server(app, partial(engine.stop, 0), drain_s, "error")
    place = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([place],), daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < deadline and thread.is_alive(), "the server must start within 30 s"
        time.sleep(0.01)
    try:
        yield Running(Client(f"http://127.0.0.1:{place.getsockname()[1]}"), model, processor, engine)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
