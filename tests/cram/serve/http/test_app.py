"""The HTTP server, over a real socket, with a client that knows nothing of this package."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cram.attach import attach
from cram.bundle.bundle import save
from cram.bundle.format import MANIFEST, fingerprint
from cram.config import CramConfig
from cram.serve.engine.limits import Limits
from tests.cram.factories import MODELS, QUESTIONS, clip_encoder, image, routed_llava
from tests.cram.serve.http.running import data_url, messages, serving
from tests.cram.serve.serving import llava_prompt, offline

body = pytest.importorskip("cram.serve.http.body", reason="the server needs the extra `serve`")
app = pytest.importorskip("cram.serve.http.app")
Settings = body.Settings

TOKEN = "open-sesame"


def test_answers_models_and_dry_runs() -> None:
    with serving() as (client, model, processor, engine):
        status, reply = client.chat(messages=messages(QUESTIONS[0], 0), logprobs=True, top_logprobs=2, n=2)
        assert status == 200, reply
        assert [choice["finish_reason"] for choice in reply["choices"]] == ["length", "length"]
        assert reply["cram"]["mode"] == "automatic" and reply["cram"]["group"] == 0
        assert sum(reply["cram"]["gates"].values()) == pytest.approx(1, abs=1e-5)
        assert len(reply["choices"][1]["logprobs"]["content"]) == 8
        assert reply["usage"]["completion_tokens"] == 16
        status, listed, _ = client.send("/v1/models")
        assert " ".join(each["id"] for each in listed["data"]) == "cram base cram:old cram:other cram:new"
        assert client.send("/v1/models/cram:old")[1] == listed["data"][2]
        dry = client.send("/v1/cram/route", {"model": "cram", "messages": messages(QUESTIONS[0], 0)})[1]
        assert dry["group"] == 0 and dry["experts"] == ["old", "other", "new"]
        for name, gate in dry["gates"].items():
            assert gate == pytest.approx(reply["cram"]["gates"][name], abs=1e-5)
        assert client.send("/health")[1]["status"] == "ok"
        text = client.send("/metrics")[1]
        assert 'cram_requests_total{outcome="started"} 1' in text and "cram_tokens_total 16" in text
        lora = [{"id": "other", "scale": 1.5}]
        texts = set()
        for who in ({}, {"model": "base"}, {"model": "cram:old"}, {"lora": lora}):
            given = {"messages": messages(QUESTIONS[0], 0), "max_tokens": 12, **who}
            texts.add(client.chat(**given)[1]["choices"][0]["message"]["content"])
        assert len(texts) == 4
    # The model may run elsewhere once the server has stopped.
    asked = llava_prompt(processor, QUESTIONS[0], 0)
    text = processor.tokenizer.decode(offline(model, asked, 8), skip_special_tokens=True)
    assert reply["choices"][0]["message"]["content"] == text.lstrip()


def test_a_stream_says_what_the_whole_answer_says() -> None:
    with serving() as (client, *_):
        asked = {"messages": messages(QUESTIONS[1], 1, 3), "n": 2, "temperature": 1.0, "seed": 3}
        _, whole = client.chat(**asked)
        streamed = {"model": "cram", "max_tokens": 8, "stream": True, **asked}
        streamed["stream_options"] = {"include_usage": True}
        _, text, headers = client.send("/v1/chat/completions", streamed)
    assert headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in text.strip().split("\n\n")]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    assert chunks[0]["cram"] == whole["cram"]
    assert chunks[-1]["usage"] == whole["usage"]
    for index, choice in enumerate(whole["choices"]):
        pieces = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert "".join(p["delta"].get("content", "") for p in pieces) == choice["message"]["content"]
        assert pieces[-1]["finish_reason"] == choice["finish_reason"]


TEXT = {"type": "text", "text": "x"}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages must be 1 to"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "role must be"),
    ({"messages": [{"role": "user", "content": "<image> x"}]}, "must not contain"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "valid Unicode"),
    (
        {"messages": [{"role": "system", "content": "x"}, *messages("x")]},
        "no system message",
    ),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "must end with the user's"),
    ({"model": "gpt"}, "one that /v1/models lists"),
    ({"model": "cram:nobody"}, "lora must name experts among"),
    ({"lora": [{"id": "old", "scale": 1e9}]}, "scale of 'old' must be finite"),
    ({"lora": [{"id": "old"}]}, "list of {id, scale}"),
    ({"temperature": 3}, "temperature must be in [0, 2]"),
    ({"temperature": "hot"}, "temperature must be a number"),
    ({"tools": [{"type": "function"}]}, "tools is not supported"),
    ({"guess": 1}, "'guess' is not a known field"),
    (
        {"messages": [{"role": "user", "content": "x", "weight": 0}]},
        "messages[0].'weight' is not a known field",
    ),
    (
        {"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]},
        "messages[0].tool_calls is not supp",
    ),
    (
        {"messages": [{"role": "user", "content": [TEXT | {"cache_control": {}}]}]},
        "content.'cache_control' is no",
    ),
    ({"max_tokens": 4096}, "max_tokens must be at most"),
    ({"max_tokens": 1000}, "prompt and answer must fit into 512 tokens"),
    ({"top_logprobs": 2}, "top_logprobs must come with logprobs"),
    ({"stream_options": {"x" * 5000: 1}}, "stream_options must hold include_usage"),
    ({"lora": [{"id": f"nobody {n}", "scale": 1} for n in range(500)]}, "lora must name experts among"),
    ({"messages": messages("x" * 8193)}, "must have at most 8192 characters"),
]


def picture(url: str) -> dict[str, Any]:
    """A message with one picture."""
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


PICTURES = [
    ("http://127.0.0.1:1/x.png", "must be a data URL"),
    ("file:///etc/passwd", "must be a data URL"),
    ("data:image/png;base64,***", "valid base64"),
    (data_url(0)[:200], "valid base64"),
    (data_url(0)[: 22 + 120], "must be a whole picture"),
    (data_url(0, "TIFF"), "must be a whole picture"),
]


def test_wrong_requests_are_refused_and_the_server_goes_on() -> None:
    settings = Settings(max_body=200_000, max_pixels=1000)
    question = messages(QUESTIONS[0], 0)
    with serving(settings=settings) as (client, *_):
        before = client.chat(messages=question)[1]["choices"]
        for change, message in WRONG:
            status, reply = client.chat(**{"messages": question, **change})
            assert status == 400 and message in reply["error"]["message"], (change, reply)
            assert len(reply["error"]["message"]) < 500
            assert reply["error"]["type"] == "invalid_request_error"
        for url, message in PICTURES:
            status, reply = client.chat(**picture(url))
            assert status == 400 and message in reply["error"]["message"], (url[:40], reply)
        sent_back = {
            "content": "y",
            "role": "assistant",
            "refusal": None,
            "tool_calls": None,
            "annotations": [],
        }
        turns = [{"role": "user", "content": "x", "name": "Ann"}, sent_back, *question]
        turns[2]["content"][0]["image_url"]["detail"] = "high"
        assert client.chat(messages=turns)[0] == 200
        large = io.BytesIO()
        image(0).resize((40, 40)).save(large, "PNG")
        url = "data:image/png;base64," + base64.b64encode(large.getvalue()).decode()
        assert "at most 1000 pixels, got 1600" in client.chat(**picture(url))[1]["error"]["message"]
        for body in (b"{", b"[" * 100_000, b'{"model": NaN}', b"\xff", b""):
            status, reply, _ = client.send("/v1/chat/completions", body)
            assert status == 400, (body[:20], reply)
        for body in (b'{"n": 1, "n": 1}', b'{"messages": [{"a": 1, "n": [], "n": {}}]}'):
            status, reply, _ = client.send("/v1/chat/completions", body)
            assert status == 400 and "got 'n' twice" in reply["error"]["message"]
        assert client.send("/v1/chat/completions", b" " * 300_000)[0] == 413
        for header in ({"Content-Type": "text/plain"}, {"Content-Encoding": "gzip"}):
            assert client.send("/v1/chat/completions", {}, header)[0] == 415
        for path, status in (
            ("/nothing", 404),
            ("/v1/models/cram:nobody", 404),
            ("/v1/chat/completions", 405),
            ("/v1/cram/rollback", 405),
        ):
            got, reply, _ = client.send(path)
            assert got == status and reply["error"]["type"] == "invalid_request_error"
        assert client.send("/v1/cram/bundle", {"name": "x"})[0] == 404
        assert client.chat(messages=question)[1]["choices"] == before


def test_what_changes_nothing_is_taken_as_openai_takes_it() -> None:
    question = messages(QUESTIONS[0], 0)
    before, empty = ([{"role": "user", "content": "x"}, {"role": "assistant"}, *question] for _ in range(2))
    before[1]["content"] = ""
    empty[1]["content"] = None
    loud = messages(QUESTIONS[0], 0)
    head, _, data = loud[0]["content"][0]["image_url"]["url"].partition(",")
    loud[0]["content"][0]["image_url"]["url"] = f"{head.upper()},{data}"
    with serving() as (client, *_):
        for plain, other in ((question, loud), (before, empty)):
            choices = client.chat(messages=plain)[1]["choices"]
            assert client.chat(messages=other)[1].get("choices") == choices
        for together in (True, False):
            assert client.chat(messages=question, parallel_tool_calls=together)[0] == 200
        status, reply = client.chat(messages=[{"role": "user", "content": None}])
        assert status == 400 and "content must be text or a list of parts" in reply["error"]["message"]
        assert client.chat(messages=question, parallel_tool_calls="yes")[0] == 400


def test_a_client_that_sends_too_slowly_is_turned_away() -> None:
    with serving(settings=Settings(body_s=0.5)) as (client, *_):
        host, port = client.base.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as line:
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            line.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            assert line.recv(100).startswith(b"HTTP/1.1 408 ")


def test_a_full_queue_says_when_to_come_back() -> None:
    with serving(Limits(rows=1, waiting=1)) as (client, *_):
        body = {"model": "cram", "max_tokens": 150, "messages": messages(QUESTIONS[0], 0)}
        replies: list[tuple[int, Any, dict[str, str]]] = []
        threads = [
            threading.Thread(target=lambda: replies.append(client.send("/v1/chat/completions", body)))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        refused = [headers for status, _, headers in replies if status == 429]
        assert len(replies) == 8 and {status for status, _, _ in replies} == {200, 429}
        assert refused[0]["retry-after"] == "1"
        assert client.chat(messages=messages(QUESTIONS[0], 0))[0] == 200


def test_pictures_of_all_requests_have_a_bound() -> None:
    asked = {"messages": messages(QUESTIONS[0], 0), "max_tokens": 400}
    with serving(settings=Settings(max_held=1)) as (client, _, _, engine), ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.chat, **asked)
        while not engine.load[1]:
            time.sleep(0.005)
        status, reply = client.chat(**asked)
        assert status == 429 and "too many pictures" in reply["error"]["message"]
        assert first.result()[0] == 200
        deadline = time.monotonic() + 20
        while client.chat(**asked)[0] != 200:
            assert time.monotonic() < deadline, "a request that has been answered must hold nothing"


def test_a_client_that_leaves_costs_nothing_more() -> None:
    with serving(settings=Settings()) as (client, _, _, engine):
        body = {"model": "cram", "max_tokens": 400, "messages": messages(QUESTIONS[0], 0)}
        for stream in (True, False):
            request = urllib.request.Request(
                f"{client.base}/v1/chat/completions",
                json.dumps({**body, "stream": stream}).encode(),
                {"Content-Type": "application/json"},
            )
            if stream:
                with urllib.request.urlopen(request, timeout=30) as reply:
                    assert reply.readline()
            else:
                with pytest.raises(OSError):
                    urllib.request.urlopen(request, timeout=0.2)
            deadline = time.monotonic() + 20
            while any(engine.load):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            made = int(engine.metrics.text().split("\ncram_tokens_total ")[1].split()[0])
            assert made < 400 * (2 - stream)


def bad_bundles(root: Path) -> dict[str, str]:
    """Bundles that must be refused; name -> what the reply says of it."""
    model, _, _ = routed_llava()
    for name in ("cut", "nan"):
        save(model, root / name)
    cut, nan = (next((root / name / "experts" / "old").glob("*.safetensors")) for name in ("cut", "nan"))
    cut.write_bytes(cut.read_bytes()[:-10])
    tensors = load_file(nan)
    tensors[min(tensors)][0, 0] = torch.nan
    save_file(tensors, nan)
    manifest = json.loads((root / "nan" / MANIFEST).read_text())
    manifest["files"][nan.relative_to(root / "nan").as_posix()] = fingerprint(nan)
    (root / "nan" / MANIFEST).write_text(json.dumps(manifest))
    for name, other in (("stranger", MODELS["qwen2_5_vl"]()), ("sibling", MODELS["llava"](seed=1))):
        attach(other, CramConfig(), clip_encoder())
        save(other, root / name)
    family, base = "must be of family 'qwen2_5_vl'", "must be the base that sibling was trained on"
    return {"cut": "bytes", "nan": "must be finite", "stranger": family, "sibling": base}


def test_a_bundle_joins_a_running_server_and_leaves_it_again(tmp_path: Path) -> None:
    model, _, cram = routed_llava()
    save(model, tmp_path / "three")
    bad = bad_bundles(tmp_path)
    settings = replace(Settings(), admin_token=TOKEN)
    key = {"Authorization": f"Bearer {TOKEN}"}
    with serving(settings=settings, bundles=tmp_path) as (client, _, _, engine):
        question = {"messages": messages(QUESTIONS[0], 0)}
        before = client.chat(**question)[1]
        assert client.send("/v1/cram/bundle", {"name": "three"})[0] == 401
        for name in ("../three", "nobody", "a/b", ""):
            assert client.send("/v1/cram/bundle", {"name": name}, key)[0] == 400
        for name, reason in bad.items():
            status, reply, _ = client.send("/v1/cram/bundle", {"name": name}, key)
            message = reply["error"]["message"]
            assert status == 400 and message.startswith(f"bundle {name} was refused: "), message
            assert reason in message and str(tmp_path) not in message and "\n" not in message, message
            after = client.chat(**question)[1]
            assert after["cram"] == before["cram"] and after["choices"] == before["choices"]
        status, reply, _ = client.send("/v1/cram/bundle", {"name": "three"}, key)
        assert status == 200 and reply["version"] == 2 and reply["experts"] == ["old", "other", "new"]
        after = client.chat(**question)[1]
        assert after["cram"]["bundle"] == 2 and after["choices"] == before["choices"]
        assert client.send("/v1/cram/rollback", {}, key)[1]["version"] == 1
        assert client.chat(**question)[1]["cram"]["bundle"] == 1


def test_a_watch_outlives_every_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    polls = []

    def poll() -> None:
        polls.append(1)
        raise KeyError("unforeseen")

    async def watch() -> None:
        task = asyncio.create_task(app._watch(SimpleNamespace(poll=poll)))
        while len(polls) < 3 and not task.done():
            await asyncio.sleep(0.005)
        task.cancel()

    monkeypatch.setattr(app, "WATCH_S", 0.0)
    asyncio.run(asyncio.wait_for(watch(), 30))
    assert len(polls) >= 3


def test_the_official_client_works_unchanged() -> None:
    openai = pytest.importorskip("openai", reason="the official client is not installed")
    with serving() as (client, *_), openai.OpenAI(base_url=f"{client.base}/v1", api_key="none") as official:
        assert [model.id for model in official.models.list()][:2] == ["cram", "base"]
        asked: dict[str, Any] = {
            "model": "cram",
            "messages": messages(QUESTIONS[0], 0),
            "max_completion_tokens": 8,
            "n": 2,
            "logprobs": True,
            "top_logprobs": 1,
        }
        whole = official.chat.completions.create(**asked)
        assert whole.choices[0].message.content == whole.choices[1].message.content
        assert whole.choices[0].logprobs.content[0].top_logprobs
        assert whole.model_extra["cram"]["group"] == 0
        streamed = ["", ""]
        for chunk in official.chat.completions.create(**asked, stream=True):
            for choice in chunk.choices:
                streamed[choice.index] += choice.delta.content or ""
        assert streamed == [choice.message.content for choice in whole.choices]
        mixed = official.chat.completions.create(**asked, extra_body={"lora": [{"id": "new", "scale": 2}]})
        assert mixed.model_extra["cram"]["mode"] == "mixture"
        with pytest.raises(openai.BadRequestError, match="temperature must be"):
            official.chat.completions.create(**{**asked, "temperature": 5})


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("localhost", "localhost"),
        ("127.0.0.1:8000", "127.0.0.1"),
        ("[::1]:8000", "::1"),
        ("[::1]", "::1"),
        ("localhost@evil", None),
        ("evil/localhost", None),
        ("::1", None),
        ("", None),
    ],
)
def test_names_in_the_host_header(header: str, name: str | None) -> None:
    assert app.host_name(header) == name
