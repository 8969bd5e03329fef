"""The middleware over a fake vLLM: what reaches it, what is refused before CLIP, what clients are told."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from cram.serve.vllm.front.middleware import CramMiddleware, load_router
from cram.serve.vllm.front.proxy import Forward
from cram.serve.vllm.front.routing import BundleRouter
from cram.serve.vllm.group import KEY, encode
from tests.cram import factories
from tests.cram.serve.vllm.bundles import small_bundle
from tests.cram.serve.vllm.front.fakes import CHAT, FakeVllm, ask, conversation


@pytest.mark.parametrize(("question", "seeds"), [(0, (0,)), (0, (1, 2)), (1, (1,)), (0, ()), (1, ())])
def test_a_request_gets_the_group_and_gates_of_the_attached_model(
    router: BundleRouter, place: Path, question: int, seeds: tuple[int, ...]
) -> None:
    text = factories.QUESTIONS[question]
    _, handle = small_bundle(place / "again")
    route = handle.route(handle.encode([text], [[factories.image(k) for k in seeds]]))
    vllm = FakeVllm()
    answer = ask(CramMiddleware(vllm, router), CHAT, conversation(text, *seeds, temperature=0))
    ((path, sent),) = vllm.seen
    assert answer.status_code == 200 and path == CHAT
    group = int(route.groups[0])
    (adapter,) = [each for each in router.adapters if each.index == group]
    assert group == question and sent["model"] == adapter.name and sent["temperature"] == 0
    columns = handle.method.router.experts_of(group)
    gates = adapter.group.gates(sent["vllm_xargs"][KEY])
    np.testing.assert_allclose(gates, route.gates[:, 0, columns].numpy(), rtol=0, atol=1e-6)
    assert answer.headers["x-cram-group"] == str(group) and answer.headers["x-own"] == "1"
    assert answer.headers["x-cram-adapter"] == adapter.name and answer.headers["x-cram-mode"] == "automatic"
    told = json.loads(answer.headers["x-cram-gates"])
    assert told == {
        name: round(m, 4) for name, m in zip(adapter.group.experts, gates.mean(0).tolist(), strict=True) if m
    }


def test_equal_requests_get_equal_bits_and_images_pass_clip_once(
    router: BundleRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm, passes = FakeVllm(), []
    encode_images = type(router.encoder).encode_images
    monkeypatch.setattr(
        type(router.encoder),
        "encode_images",
        lambda self, images: passes.append(images) or encode_images(self, images),
    )
    app = CramMiddleware(vllm, router)
    for _ in range(2):
        ask(app, CHAT, conversation(factories.QUESTIONS[0], 21, 22))
    ask(app, CHAT, conversation(factories.QUESTIONS[0], 22))
    assert vllm.seen[0] == vllm.seen[1] != vllm.seen[2] and len(passes) == 2


def test_completions_are_routed_by_their_last_user_turn(router: BundleRouter) -> None:
    vllm = FakeVllm()
    app = CramMiddleware(vllm, router)
    for question in (0, 1):
        prompt = factories.prompt(factories.QUESTIONS[question], 0)
        answer = ask(app, "/v1/completions", {"model": "cram", "prompt": prompt})
        assert answer.headers["x-cram-group"] == str(question)
    many = ask(app, "/v1/completions", {"model": "cram", "prompt": ["a", "b"]})
    assert many.status_code == 400 and "prompt must be one text" in many.text


def test_clients_name_the_mixture(router: BundleRouter) -> None:
    vllm = FakeVllm()
    app = CramMiddleware(vllm, router)
    lora = [{"id": "old", "scale": 0.5}, {"id": "new", "scale": -1}]
    assert ask(app, CHAT, conversation("x", lora=lora)).headers["x-cram-mode"] == "mixture"
    ask(app, CHAT, {**conversation("x"), "model": "cram:other"})
    base = ask(app, CHAT, conversation("x", lora=[]))
    mixed, alone, plain = (body for _, body in vllm.seen)
    first, second = router.adapters
    assert mixed["model"] == first.name and "lora" not in mixed
    assert first.group.gates(mixed["vllm_xargs"][KEY])[1].tolist() == [0.5, -1.0]
    assert (
        alone["model"] == second.name and second.group.gates(alone["vllm_xargs"][KEY]).tolist() == [[1.0]] * 2
    )
    assert plain["model"] == "base" and "vllm_xargs" not in plain and base.headers["x-cram-mode"] == "base"


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        (CHAT, {"lora": [{"id": "old", "scale": 1}, {"id": "other", "scale": 1}]}, "experts of one group"),
        (CHAT, {"lora": [{"id": "nobody", "scale": 1}]}, "lora must name experts among"),
        (CHAT, {"model": "cram:nobody"}, "lora must name experts among"),
        (CHAT, {"lora": [{"id": "old", "scale": 1e300}]}, "scales of at most 100"),
        (CHAT, {"lora": {"old": 1}}, "lora must be a list"),
        (CHAT, {"model": "cram:old", "lora": []}, "lora must come with the model"),
        (CHAT, {"vllm_xargs": {KEY: "AAAA"}}, "must come with a group's own name"),
        (CHAT, {"vllm_xargs": 3}, "vllm_xargs must be an object"),
        (CHAT, {"messages": 3}, "messages must be a list"),
        (CHAT, {"messages": [{"role": "system", "content": "x"}]}, "must hold a user message"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            "text and image_url parts",
        ),
        (CHAT, conversation("x", *[0] * 17), "images must be 16 at most"),
        (CHAT, {"use_beam_search": True}, "use_beam_search must be left out"),
        (CHAT, {"n": 2, "best_of": 3}, "best_of must be n or left out, got 3 for n 2"),
        (CHAT, {"model": "GROUP", "best_of": 2}, "best_of must be n or left out, got 2 for n None"),
        ("/v1/responses", {"input": "x"}, "must be asked through /v1/chat/completions"),
        ("/v1/messages", {}, "must be asked through /v1/chat/completions"),
    ],
)
def test_what_cannot_be_routed_is_refused_with_400(
    router: BundleRouter, path: str, change: dict[str, Any], message: str
) -> None:
    vllm = FakeVllm()
    app = CramMiddleware(vllm, router)
    named = {name: router.adapters[0].name if value == "GROUP" else value for name, value in change.items()}
    answer = ask(app, path, {**conversation("x"), **named})
    assert answer.status_code == 400 and message in answer.json()["error"]["message"] and not vllm.seen
    assert ask(app, CHAT, conversation("x")).status_code == 200


def strip(width: int, height: int) -> str:
    """An empty picture of a size."""
    buffer = io.BytesIO()
    Image.new("L", (width, height)).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:1/x.png", "must be a data URL in base64"),
        ("data:image/png;base64,AAAA", "must be a whole picture"),
        ("data:image/png;base64,####", "must be valid base64"),
        (strip(1, 1000), "200 times as long as wide"),
        (7, "must be a data URL in base64"),
    ],
)
def test_what_is_no_image_is_refused(router: BundleRouter, url: Any, message: str) -> None:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "x"}]
    body = {"model": "cram", "messages": [{"role": "user", "content": parts}]}
    answer = ask(CramMiddleware(FakeVllm(), router), CHAT, body)
    assert answer.status_code == 400 and message in answer.text


def test_without_the_key_no_clip_runs(router: BundleRouter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BundleRouter, "automatic", lambda *arguments: pytest.fail("routed"))
    vllm = FakeVllm()
    app = CramMiddleware(Outer(vllm), router)
    for headers in ({}, {"authorization": "Bearer wrong"}):
        answer = ask(app, CHAT, conversation("x", 0), headers)
        assert (answer.status_code, answer.json()) == (401, {"error": "Unauthorized"})
    with pytest.raises(pytest.fail.Exception):
        ask(app, CHAT, conversation("x", 0))


class Outer:
    """A layer between this middleware and the authentication."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)


def test_other_requests_pass_untouched(router: BundleRouter) -> None:
    vllm = FakeVllm()
    app = CramMiddleware(vllm, router)
    for body in (
        {"model": "another", "x": [1.5]},
        {"model": router.adapters[0].name, "add_special_tokens": True, "vllm_xargs": {KEY: "A"}},
        [1],
    ):
        answer = ask(app, CHAT, body)
        assert answer.json() == body == vllm.seen[-1][1] and "x-cram-mode" not in answer.headers
    assert ask(app, "/health", None, method="GET").status_code == 200


def test_the_list_of_models_names_the_mixture_and_each_expert(router: BundleRouter) -> None:
    app = CramMiddleware(FakeVllm(), router)
    listed = [each["id"] for each in ask(app, "/v1/models", None, method="GET").json()["data"]]
    assert listed == ["cram", "cram:old", "cram:new", "cram:other", "base"]
    assert ask(app, "/v1/models", None, {}, "GET").status_code == 401


def test_the_proxy_is_the_same_middleware_and_asks_for_the_key_first(
    router: BundleRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm = FakeVllm()
    forward = Forward("http://upstream")
    forward._client = httpx.AsyncClient(transport=httpx.ASGITransport(vllm), base_url="http://upstream")
    app = CramMiddleware(forward, router)
    body = conversation(factories.QUESTIONS[1], 1)
    answer = ask(app, CHAT, body)
    ask(CramMiddleware(vllm, router), CHAT, body)
    assert answer.status_code == 200 and vllm.seen[0] == vllm.seen[1]
    assert answer.headers["x-cram-group"] == "1" and answer.headers["x-own"] == "1"
    monkeypatch.setattr(BundleRouter, "automatic", lambda *arguments: pytest.fail("routed"))
    assert ask(app, CHAT, body, {}).status_code == 401


def test_a_server_that_is_gone_is_502(router: BundleRouter) -> None:
    app = CramMiddleware(Forward("http://127.0.0.1:9"), router)
    for body in ({"model": "base"}, conversation("x")):
        answer = ask(app, CHAT, body)
        assert answer.status_code == 502 and "must answer, got ConnectError" in answer.text


def test_the_start_fails_without_a_bundle(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    async def start(app: Any) -> list[Any]:
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "lifespan.startup"}

        async def send(message: Any) -> None:
            sent.append(message)

        await app({"type": "lifespan"}, receive, send)
        return sent

    monkeypatch.delenv("CRAM_BUNDLE", raising=False)
    (failed,) = asyncio.run(start(CramMiddleware(FakeVllm())))
    assert (
        failed["type"] == "lifespan.startup.failed" and "CRAM_BUNDLE must name a folder" in failed["message"]
    )
    monkeypatch.setenv("CRAM_BUNDLE", str(place / "bundle"))
    monkeypatch.setenv("CRAM_EXPORT", str(place / "nowhere"))
    (failed,) = asyncio.run(start(CramMiddleware(FakeVllm())))
    assert "must hold the export of" in failed["message"]
    monkeypatch.setenv("CRAM_EXPORT", str(place / "out"))
    monkeypatch.setenv("CRAM_CLIP", str(place / "clip"))
    assert load_router().names == ["old", "new", "other"]
    (started,) = asyncio.run(start(CramMiddleware(FakeVllm())))
    assert started["type"] == "lifespan.startup.complete"


def test_chats_with_the_bundle_have_the_special_tokens_of_training(router: BundleRouter) -> None:
    vllm = FakeVllm()
    app = CramMiddleware(vllm, router)
    group = router.adapters[0].name
    for model in ("cram", "cram:old", "base", group):
        ask(app, CHAT, conversation("Which?", model=model))
    assert [sent["add_special_tokens"] for _, sent in vllm.seen] == [True] * 4
    vllm.seen.clear()
    ask(app, CHAT, conversation("Which?", add_special_tokens=False))
    ask(app, CHAT, conversation("Which?", model="another"))
    ask(app, "/v1/completions", {"model": "base", "prompt": "Which?"})
    assert [sent.get("add_special_tokens") for _, sent in vllm.seen] == [False, None, None]


def test_gates_survive_the_way_to_vllm() -> None:
    assert encode(np.ones((1, 1), np.float32)) == "AACAPw=="
