"""Requests that end early: the client leaves, or the server stops. Each ends in words and frees its place."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest

from cram.serve.engine.engine import Engine
from cram.serve.engine.limits import Limits
from tests.cram.factories import QUESTIONS, routed_llava
from tests.cram.serve.http.running import Running, messages, serving
from tests.cram.serve.http.test_faults import PATH, TOKENS, address, expected, head, neighbour

app = pytest.importorskip("cram.serve.http.app", reason="the server needs the extra `serve`")
connection = pytest.importorskip("cram.serve.http.connection")
mailbox = pytest.importorskip("cram.serve.http.mailbox")
chat = pytest.importorskip("cram.serve.http.chat")
ClientDisconnect = pytest.importorskip("starlette.requests").ClientDisconnect

LONG = {"model": "cram", "max_tokens": 400, "messages": messages("x", 1)}


def wait_for(condition: Callable[[], Any], seconds: float = 30) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it must come to that"
        time.sleep(0.005)


def scope(path: str) -> dict[str, Any]:
    """What an ASGI server says of a POST."""
    texts = {"http_version": "1.1", "method": "POST", "scheme": "http", "path": path, "root_path": ""}
    headers = [(b"content-type", b"application/json")]
    bare = {"query_string": b"", "headers": headers, "client": None, "server": None, "state": {}}
    return {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, **texts, **bare}


async def stuck(message: Any) -> None:
    """Sends to a client that takes nothing of an answer."""
    if message.get("status") == 200:
        await asyncio.Event().wait()


async def broken(message: Any) -> None:
    """Sends on a connection that is gone."""
    raise OSError


async def lost(message: Any) -> None:
    """Sends into the void, as uvicorn does when the client has gone."""


@pytest.mark.parametrize("send", [stuck, broken, lost])
@pytest.mark.parametrize("asked", [{"stream": True, "n": 3}, {"n": 3}])
def test_a_client_that_leaves_with_the_first_event_is_not_answered(
    asked: dict[str, Any], send: Callable[[Any], Awaitable[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = routed_llava()[:2]
    engine = Engine(model, processor)
    requests: list[Any] = []
    submit = engine.submit
    monkeypatch.setattr(engine, "submit", lambda request: (requests.append(request), submit(request)))

    async def leave() -> None:
        messages_in = iter([{"type": "http.request", "body": json.dumps({**LONG, **asked}).encode()}])
        there = asyncio.Event()
        put = mailbox.Mailbox._put
        monkeypatch.setattr(mailbox.Mailbox, "_put", lambda self, event: (put(self, event), there.set()))

        async def receive() -> Any:
            if (message := next(messages_in, None)) is None:
                await there.wait()
            return message or {"type": "http.disconnect"}

        served = app.create_app(engine, processor)
        async with served.router.lifespan_context(served):
            with suppress(OSError):
                await asyncio.wait_for(served(scope(PATH), receive, send), 20)
            assert requests[0].cancelled
            deadline = time.monotonic() + 20
            while any(engine.load):
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)

    asyncio.run(leave())


def test_what_comes_together_with_the_departure_is_for_nobody() -> None:
    class Http:
        async def receive(self) -> dict[str, str]:
            return {"type": "http.disconnect"}

    async def ready() -> int:
        return 1

    async def fails() -> int:
        raise ValueError

    async def run() -> None:
        for wanted in (ready, fails):
            async with mailbox.Presence(Http()) as client:
                with pytest.raises(ClientDisconnect):
                    await client.unless_gone(wanted())

    asyncio.run(run())


@contextmanager
def asking(running: Running, path: str = PATH, **asked: Any) -> Iterator[socket.socket]:
    """A client that sends a request and leaves at the end."""
    content = json.dumps({**LONG, **asked}).encode()
    with socket.create_connection(address(running.client)) as line:
        line.sendall(head(len(content)).replace(PATH.encode(), path.encode()) + content)
        yield line


@pytest.mark.parametrize("path", [PATH, "/v1/cram/route"])
def test_a_client_that_leaves_while_its_pictures_are_read_asks_nothing(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go_on, asked = threading.Event(), threading.Event(), []
    read = chat.ChatReader.read

    def slow(self: Any, body: Any) -> Any:
        if body.get("user") == "slow":
            began.set()
            assert go_on.wait(30)
        return read(self, body)

    monkeypatch.setattr(chat.ChatReader, "read", slow)
    with serving() as running:
        for name in ("submit", "decide"):
            monkeypatch.setattr(running.engine, name, lambda *given: asked.append(given))
        with asking(running, path, user="slow"):
            assert began.wait(30)
        time.sleep(0.2)
        go_on.set()
        time.sleep(0.2)
        assert not asked and running.client.send("/health")[1]["waiting"] == 0


def test_clients_that_leave_the_queue_free_their_places() -> None:
    with serving(Limits(rows=1, waiting=3)) as running, ThreadPoolExecutor(1) as pool:
        with neighbour(running):
            question = {"messages": messages(QUESTIONS[0], 2), "max_tokens": 24}
            stays = pool.submit(running.client.chat, **question)
            wait_for(lambda: running.engine.load[0] == 1)
            with asking(running, n=1, stream=True), asking(running):
                wait_for(lambda: running.engine.load[0] == 3)
                assert running.client.chat(**question)[0] == 429
            # Those who left stand behind one who waits, and the row is taken.
            wait_for(lambda: running.engine.load[0] == 1)
            assert running.engine.load[1] == 1
        status, reply = stays.result()
        assert status == 200 and reply["choices"][0]["message"]["content"] == expected("three", 2, 24)


def test_a_stop_tells_everybody_whose_answer_is_given_up() -> None:
    replies: list[Any] = []
    with ThreadPoolExecutor(8) as pool:
        with serving(Limits(rows=2, waiting=8), drain_s=0.3) as running:
            answers = {**LONG, "max_tokens": 480}
            for asked in ({"stream": True, "n": 2}, {"stream": True}, {}, {"n": 2}):
                replies.append(pool.submit(running.client.send, PATH, {**answers, **asked}))
                wait_for(lambda: running.engine.load == (max(len(replies) - 1, 0), 2))
            uploads = socket.create_connection(address(running.client), timeout=30)
            uploads.sendall(head(100) + b"{")
            time.sleep(0.1)
            stopped = time.monotonic()
        assert time.monotonic() - stopped < 10
    with uploads:
        assert uploads.recv(100).startswith(b"HTTP/1.1 503 ")
    (status, flying, _), *waiting = [each.result() for each in replies]
    said = {
        "error": {"message": "the server has stopped", "type": "server_error", "param": None, "code": None}
    }
    assert status == 200 and json.loads(flying.strip().split("\n\n")[-1].removeprefix("data: ")) == said
    assert [(status, reply) for status, reply, _ in waiting] == [(500, said)] * 3


def test_a_stop_waits_for_the_answers_that_end_in_time() -> None:
    with ThreadPoolExecutor(2) as pool:
        with serving(Limits(rows=1), drain_s=60) as running:
            question = {"messages": messages(QUESTIONS[0], 0), "max_tokens": TOKENS}
            replies = [pool.submit(running.client.chat, **question) for _ in range(2)]
            wait_for(lambda: running.engine.load == (1, 1))
        for status, reply in (each.result() for each in replies):
            assert status == 200
            assert reply["choices"][0]["message"]["content"] == expected("three", 0, TOKENS)


@contextmanager
def endless(drain_s: float) -> Iterator[tuple[Any, threading.Event, socket.socket]]:
    """A server of answers that end when they are given up, a sign of that, and a client of one of them."""
    given_up = threading.Event()

    async def endless_answers(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begun ", "more_body": True})
        while not given_up.is_set():
            await asyncio.sleep(0.01)
        await send({"type": "http.response.body", "body": b"given up"})

    server = connection.web_server(endless_answers, given_up.set, drain_s, "critical")
    server.config.lifespan = "off"
    with ExitStack() as stack:
        place = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        thread = threading.Thread(target=server.run, args=([place],), daemon=True)
        thread.start()
        wait_for(lambda: server.started)
        line = stack.enter_context(socket.create_connection(place.getsockname(), timeout=30))
        line.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        heard = b""
        while b"begun" not in heard:
            heard += line.recv(1000)
        yield server, given_up, line
        thread.join(30)
        assert not thread.is_alive()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_gives_up_what_the_first_one_waits_for(second: signal.Signals) -> None:
    with endless(drain_s=60) as (server, given_up, line):
        server.handle_exit(signal.SIGTERM, None)
        assert not given_up.wait(0.4)
        server.handle_exit(second, None)
        said = b""
        while piece := line.recv(1000):
            said += piece
    assert b"given up" in said and said.endswith(b"0\r\n\r\n")
    # What ended the process is the first signal.
    assert server._captured_signals == [signal.SIGTERM]
