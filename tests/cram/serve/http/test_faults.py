"""Hostile and unlucky clients: each gets a clear reply, and no neighbour's answer changes."""

from __future__ import annotations

import base64
import io
import json
import random
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cram.bundle.bundle import save
from cram.serve.engine.limits import Limits
from tests.cram.factories import QUESTIONS, routed_llava
from tests.cram.serve.engine.test_versions import grown
from tests.cram.serve.http.running import Client, Running, data_url, messages, serving
from tests.cram.serve.serving import llava_prompt, offline

body = pytest.importorskip("cram.serve.http.body", reason="the server needs the extra `serve`")
fields = pytest.importorskip("cram.serve.http.fields")
TOKENS = 100
PATH = "/v1/chat/completions"


def address(client: Client) -> tuple[str, int]:
    """Host and port of a server."""
    host, port = client.base.removeprefix("http://").split(":")
    return host, int(port)


def head(length: int) -> bytes:
    """The head of a chat request whose body has so many bytes."""
    lines = ("Host: localhost", "Content-Type: application/json", f"Content-Length: {length}")
    return "\r\n".join((f"POST {PATH} HTTP/1.1", *lines, "", "")).encode()


@cache
def expected(name: str, seed: int, tokens: int) -> str:
    """The text that the model gives when it is alone; "four" has one more expert than "three"."""
    model, processor, _ = grown() if name == "four" else routed_llava()
    ids = offline(model, llava_prompt(processor, QUESTIONS[0], seed), tokens)
    text: str = processor.tokenizer.decode(ids, skip_special_tokens=True)
    return text.lstrip()


@contextmanager
def neighbour(running: Running) -> Iterator[None]:
    """Somebody else's long answer, which must be the one that the model gives when it is alone."""
    found: list[Any] = []
    question = {"messages": messages(QUESTIONS[0], 0), "max_tokens": TOKENS}
    thread = threading.Thread(target=lambda: found.append(running.client.chat(**question)))
    thread.start()
    while not running.engine.load[1]:
        time.sleep(0.005)
    yield
    thread.join(60)
    status, reply = found[0]
    assert status == 200
    assert reply["choices"][0]["message"]["content"] == expected("three", 0, TOKENS)


def leaves_while_the_prompt_is_read(client: Client) -> None:
    """Goes before the first token."""
    content = json.dumps({"model": "cram", "max_tokens": 300, "messages": messages("x " * 100)}).encode()
    with socket.create_connection(address(client)) as line:
        line.sendall(head(len(content)) + content)


def leaves_in_the_middle_of_a_stream(client: Client) -> None:
    """Goes after the first token."""
    asked = {"model": "cram", "max_tokens": 300, "stream": True, "n": 2, "messages": messages("x", 1)}
    content = json.dumps(asked).encode()
    with socket.create_connection(address(client)) as line:
        line.sendall(head(len(content)) + content)
        assert b"200 OK" in line.recv(100)


def sends_a_huge_body(client: Client) -> None:
    """Announces 100 MB and sends them as far as it may."""
    with socket.create_connection(address(client), timeout=30) as line:
        line.sendall(head(100_000_000))
        assert line.recv(100).startswith(b"HTTP/1.1 413 ")


def sends_a_huge_body_in_chunks(client: Client) -> None:
    """Announces nothing and never ends."""
    with socket.create_connection(address(client), timeout=30) as line:
        line.sendall(
            f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            "Transfer-Encoding: chunked\r\n\r\n".encode()
        )
        block = b"10000\r\n" + b" " * 65536 + b"\r\n"
        with pytest.raises(OSError):
            for _ in range(4000):
                line.sendall(block)
        # What the server said last may have been lost with the connection.
    assert client.send("/health")[0] == 200


def sends_malformed_json(client: Client) -> None:
    """Sends text that is no JSON, or too deep."""
    for content in (b'{"model": "cram"', b"nul", b"\x00" * 50, b'{"a":' * 5000, b"1" * 10_000):
        assert client.send(PATH, content)[0] == 400


def sends_a_bomb(client: Client) -> None:
    """A small file that says that it is a huge picture."""
    buffer = io.BytesIO()
    Image.new("1", (8, 8)).save(buffer, "PNG")
    for side in (6_000, 30_000, 2**31 - 1):
        # The head of the file: length, name, width, height, five more bytes and a checksum.
        header = b"IHDR" + side.to_bytes(4, "big") * 2 + buffer.getvalue()[24:29]
        claimed = buffer.getvalue()[:12] + header + zlib.crc32(header).to_bytes(4, "big")
        data = base64.b64encode(claimed + buffer.getvalue()[33:]).decode()
        content = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}]
        status, reply = client.chat(messages=[{"role": "user", "content": content}])
        assert status == 400 and "an image must have at most" in reply["error"]["message"], reply


def sends_many_large_pictures(client: Client) -> None:
    """Pictures each of which is small enough."""
    buffer = io.BytesIO()
    Image.new("RGB", (2000, 2000)).save(buffer, "JPEG")
    url = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}] * 16
    status, reply = client.chat(messages=[{"role": "user", "content": content}])
    assert status == 400 and "an image must have at most" in reply["error"]["message"]


def sends_a_strip(client: Client) -> None:
    """A picture of few pixels that a resize by its shorter side makes enormous."""
    for size in ((1, 60_000), (60_000, 1), (3, 601)):
        buffer = io.BytesIO()
        Image.new("L", size).save(buffer, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}]
        for path in (PATH, "/v1/cram/route"):
            asked = {"model": "cram", "messages": [{"role": "user", "content": content}]}
            status, reply, _ = client.send(path, asked)
            assert status == 400 and "200 times as long as wide" in reply["error"]["message"], reply


def names_scales_that_are_no_numbers(client: Client) -> None:
    """Scales that JSON does not have, or that no float has."""
    for scale in ("NaN", "Infinity", "1e999", "-1e999", str(10**400)):
        asked = {"model": "cram", "messages": messages("x"), "lora": [{"id": "old", "scale": "SCALE"}]}
        text = json.dumps(asked).replace('"SCALE"', scale)
        for path in (PATH, "/v1/cram/route"):
            status, reply, _ = client.send(path, text.encode())
            assert status == 400, (scale, reply)


def names_unknown_models(client: Client) -> None:
    """Names that nobody has."""
    for model in ("gpt-4o", "", "cram:", "cram:nobody", "base:old", "\ud800", "../../etc/passwd", "x" * 5000):
        for path in (PATH, "/v1/cram/route"):
            status, reply, _ = client.send(path, {"model": model, "messages": messages("x")})
            assert status == 400 and len(reply["error"]["message"]) < 500


def calls_by_a_foreign_name(client: Client) -> None:
    """A page of another site whose name leads here."""
    for name in (
        "evil.example",
        "evil.example:8000",
        "localhost@evil.example",
        "localhost.evil.example",
        "[",
    ):
        status, reply, _ = client.send("/v1/models", headers={"Host": name})
        assert status == 400 and "must name one of 127.0.0.1, localhost" in reply["error"]["message"]
    assert client.send("/v1/models", headers={"Host": "LOCALHOST:8000"})[0] == 200


def sends_requests_without_end_behind_one(client: Client) -> None:
    """Does not wait for the answer before it sends more."""
    content = json.dumps({"model": "cram", "max_tokens": 300, "messages": messages("x")}).encode()
    more, sent = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000, 0
    with socket.create_connection(address(client), timeout=0.5) as line:
        line.sendall(head(len(content)) + content)
        with pytest.raises(TimeoutError):
            while sent < 100_000_000:
                sent += line.send(more)
    # What the kernel holds.
    assert sent < 20_000_000


FAULTS: list[Callable[[Client], None]] = [
    leaves_while_the_prompt_is_read,
    leaves_in_the_middle_of_a_stream,
    sends_a_huge_body,
    sends_a_huge_body_in_chunks,
    sends_malformed_json,
    sends_a_bomb,
    sends_many_large_pictures,
    sends_a_strip,
    names_scales_that_are_no_numbers,
    names_unknown_models,
    calls_by_a_foreign_name,
    sends_requests_without_end_behind_one,
]


def test_no_fault_of_a_client_reaches_its_neighbours() -> None:
    made = body.Settings(hosts=("127.0.0.1", "localhost"))
    with serving(settings=made) as running:
        for fault in FAULTS:
            with neighbour(running):
                fault(running.client)
        deadline = time.monotonic() + 20
        while any(running.engine.load):
            assert time.monotonic() < deadline, "the answers of those who left must end"
            time.sleep(0.02)


def test_connections_that_ask_nothing_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cram.serve.http.connection.HEAD_S", 0.5)
    asked = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    content = json.dumps({"model": "cram", "max_tokens": 2, "messages": messages("x")}).encode()
    with serving() as (client, *_), ExitStack() as stack:

        def opened(said: bytes) -> socket.socket:
            line = stack.enter_context(socket.create_connection(address(client), timeout=60))
            line.sendall(said)
            return line

        silent = [opened(said) for said in (b"", b"GET /hea", asked[:-2])]
        second, slow = opened(asked), opened(head(len(content)) + content[:9])
        answered = b""
        while not answered.endswith(b"}"):
            answered += second.recv(4096)
        second.sendall(asked[:-2])
        assert [line.recv(4096) for line in (*silent, second)] == [b""] * 4
        # A request that has begun has the time of its own limits.
        slow.sendall(content[9:])
        assert slow.recv(100).startswith(b"HTTP/1.1 200 ")


def test_bodies_of_all_requests_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many that send a large body slowly must not fill the memory."""
    question = {"model": "cram", "max_tokens": 2, "messages": messages("x")}
    large = json.dumps({**question, "metadata": "m" * 300_000}).encode()
    made, readers = body.Settings(max_bodies=1_000_000), []
    made_by = body.Bodies

    def noted(settings: Any) -> Any:
        readers.append(made_by(settings))
        return readers[-1]

    monkeypatch.setattr("cram.serve.http.server.Bodies", noted)
    with serving(settings=made) as (client, *_), ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection(address(client), timeout=60)) for _ in range(3)]
        for line in slow:
            line.sendall(head(len(large)) + large[:-1])
        while readers[0]._held < 3 * (len(large) - 1):
            time.sleep(0.02)
        reply = client.send(PATH, large)
        assert reply[0] == 429 and reply[2]["retry-after"] == "1"
        assert "too large together" in reply[1]["error"]["message"]
        # Small ones pass; what was sent or has gone makes room.
        assert client.send(PATH, question)[0] == 200
        slow[0].sendall(large[-1:])
        assert slow[0].recv(100).startswith(b"HTTP/1.1 200 ")
        slow[1].close()
        deadline = time.monotonic() + 20
        while client.send(PATH, large)[0] != 200:
            assert time.monotonic() < deadline


def test_connections_that_take_nothing_are_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cram.serve.http.connection.HEAD_S", 0.2)
    with serving() as (client, *_), socket.socket() as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.settimeout(0.2)
        line.connect(address(client))
        deadline = time.monotonic() + 30
        with pytest.raises(ConnectionError):
            while True:
                assert time.monotonic() < deadline, "who reads nothing must not stay for ever"
                with suppress(TimeoutError):
                    line.send(b"GET /page.js HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50)
        assert client.send("/health")[0] == 200


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("cram"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
URL = VALUES | st.just(data_url(0)[:90])
PART = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image_url", "audio"])},
    optional={"text": VALUES, "image_url": VALUES | st.fixed_dictionaries({"url": URL})},
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "assistant", "tool"]) | VALUES},
    optional={"content": VALUES | st.lists(PART | VALUES, max_size=3), "name": VALUES},
)
LORA = st.fixed_dictionaries({"id": st.just("old") | VALUES, "scale": VALUES})
OTHERS = {name: VALUES for name in (*fields.FIELDS, *fields.WITHOUT_EFFECT)}
BODY = st.fixed_dictionaries(
    {
        "model": st.sampled_from(["cram", "base", "cram:old"]) | VALUES,
        "messages": st.just(messages("x", 0)) | st.lists(MESSAGE, max_size=3) | VALUES,
        "max_tokens": st.just(1) | VALUES,
    },
    optional={
        **{
            name: values for name, values in OTHERS.items() if name not in ("model", "messages", "max_tokens")
        },
        "lora": st.lists(LORA, max_size=2) | VALUES,
    },
)


# A right request with one wrong field goes further than one that is wrong everywhere.
RIGHT = {"model": "cram", "messages": messages("x", 0), "max_tokens": 1}
ONE_WRONG = st.tuples(st.sampled_from(sorted(OTHERS)), VALUES | st.lists(LORA, max_size=2)).map(
    lambda pair: {**RIGHT, pair[0]: pair[1]}
)


def test_no_field_can_hold_what_breaks_the_server() -> None:
    with serving(Limits(tokens=4)) as (client, *_):

        @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
        @given(BODY | ONE_WRONG, st.sampled_from([PATH, "/v1/cram/route"]))
        def attack(asked: Any, path: str) -> None:
            status, reply, _ = client.send(path, json.dumps(asked).encode())
            assert status in (200, 400), (status, reply)
            if status == 400:
                error = reply["error"]
                assert error["type"] == "invalid_request_error" and "Traceback" not in error["message"]

        attack()


def test_experts_change_under_load_without_a_lost_or_mixed_answer(tmp_path: Path) -> None:
    for name, (model, *_) in (("three", routed_llava()), ("four", grown())):
        save(model, tmp_path / name)
    assert all(expected("three", seed, 24) != expected("four", seed, 24) for seed in (0, 2))
    admin, key = body.Settings(admin_token="open"), {"Authorization": "Bearer open"}
    replies: list[tuple[int, int, Any]] = []
    served = {1: "three"}
    with serving(settings=admin, bundles=tmp_path) as (client, *_), ThreadPoolExecutor(5) as pool:
        ended = threading.Event()

        def asks(number: int) -> None:
            generator = random.Random(number)
            while not ended.is_set():
                seed = generator.randrange(4)
                status, reply = client.chat(messages=messages(QUESTIONS[0], seed), max_tokens=24)
                replies.append((status, seed, reply))

        asking = [pool.submit(asks, number) for number in range(5)]
        for turn in range(6):
            name = ("four", "three")[turn % 2]
            status, reply, _ = client.send("/v1/cram/bundle", {"name": name}, key)
            assert status == 200
            served[reply["version"]] = name
            wanted = len(replies) + 6
            while len(replies) < wanted and not any(each.done() for each in asking):
                time.sleep(0.005)
        ended.set()
        for each in asking:
            each.result()
    assert {status for status, _, _ in replies} == {200}
    for _, seed, reply in replies:
        name = served[reply["cram"]["bundle"]]
        assert reply["choices"][0]["message"]["content"] == expected(name, seed, 24)
    assert len({reply["cram"]["bundle"] for _, _, reply in replies}) > 4
