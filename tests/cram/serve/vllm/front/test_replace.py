"""Another bundle on a running server over a fake vLLM: it joins whole, or the old one stays."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import cram
from cram.serve.vllm.export import export_groups, exported
from cram.serve.vllm.front.middleware import CramMiddleware
from cram.serve.vllm.front.routing import BundleRouter
from tests.cram import factories
from tests.cram.serve.vllm.bundles import small_bundle
from tests.cram.serve.vllm.front.fakes import ADMIN, CHAT, KEY_HEADER, FakeVllm, ask, conversation


class FakeModels:
    """vLLM's list of served models; an adapter named in `broken` cannot be loaded."""

    def __init__(self, names: list[str], base: Path) -> None:
        self.base_model_paths = [SimpleNamespace(name="base", model_path=str(base))]
        self.lora_requests = dict.fromkeys(names)
        self.broken = ""

    async def load_lora_adapter(self, request: Any) -> Any:
        if request.lora_name.startswith(self.broken or "\0"):
            return SimpleNamespace(
                error=SimpleNamespace(message="LoRA rank 64 is greater than max_lora_rank 8.")
            )
        assert (Path(request.lora_path) / "adapter_config.json").is_file()
        self.lora_requests[request.lora_name] = None
        return "Success"

    async def unload_lora_adapter(self, request: Any) -> str:
        del self.lora_requests[request.lora_name]
        return "Success"


@pytest.fixture
def running(place: Path, router: BundleRouter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server that takes bundles of `tmp_path / bundles`; `more` has a new expert in group 1."""
    protocol = ModuleType("vllm.entrypoints.serve.lora.protocol")
    protocol.LoadLoRAAdapterRequest = protocol.UnloadLoRAAdapterRequest = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, protocol.__name__, protocol)
    model, handle = small_bundle(tmp_path / "unused")
    handle.method.add_expert("newest", factories.expert_weights(handle, 9), 1, torch.ones(16), trained=False)
    cram.save(model, tmp_path / "bundles/more")
    with torch.no_grad():
        for linear in handle.modules.values():
            linear.base.weight.mul_(1.1)
    cram.save(model, tmp_path / "bundles/of_another_base")
    settings = {
        "CRAM_EXPORT": place / "out",
        "CRAM_BUNDLES": tmp_path / "bundles",
        "CRAM_ADMIN_TOKEN": "open",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    vllm = FakeVllm()
    app = CramMiddleware(vllm, router)
    models = FakeModels([adapter.name for adapter in router.adapters], place / "base")

    async def served(scope: Any, receive: Any, send: Any) -> None:
        scope["app"] = SimpleNamespace(state=SimpleNamespace(openai_serving_models=models))
        await app(scope, receive, send)

    return served, vllm, models


def test_a_bundle_is_added_while_requests_run(running: Any, place: Path, tmp_path: Path) -> None:
    served, vllm, models = running
    before = list(models.lora_requests)
    ask(served, CHAT, {**conversation("x"), "model": "cram:other"})
    assert ask(served, CHAT, {**conversation("x"), "model": "cram:newest"}).status_code == 400
    answer = ask(served, "/v1/cram/bundle", {"name": "more"}, ADMIN)
    assert answer.status_code == 200 and answer.json()["experts"] == ["old", "new", "other", "newest"]
    ask(served, CHAT, {**conversation("x"), "model": "cram:newest"})
    ask(served, CHAT, {**conversation("x"), "model": "cram:old"})
    names = [body["model"] for _, body in vllm.seen]
    after = [adapter.name for adapter in exported(tmp_path / "bundles/more", place / "out")]
    assert names == [before[1], after[1], before[0]] and after[0] == before[0]
    assert set(models.lora_requests) == {*before, *after}


@pytest.mark.parametrize(
    ("body", "headers", "status", "message"),
    [
        ({"name": "more"}, {}, 401, "admin token"),
        ({"name": "more"}, KEY_HEADER, 401, "admin token"),
        ({"name": "../bundles/more"}, ADMIN, 400, "the name of a bundle"),
        ({"name": "absent"}, ADMIN, 400, "must be that of a folder"),
        ({"folder": "more"}, ADMIN, 400, "the name of a bundle"),
        ({"name": "damaged"}, ADMIN, 400, "the one before stays"),
        ({"name": "of_another_base"}, ADMIN, 400, "model must be the base that"),
    ],
)
def test_a_bad_bundle_is_refused_and_the_old_one_stays(
    running: Any, tmp_path: Path, body: Any, headers: dict[str, str], status: int, message: str
) -> None:
    served, _, models = running
    before = dict(models.lora_requests)
    (tmp_path / "bundles/damaged").mkdir()
    answer = ask(served, "/v1/cram/bundle", body, headers)
    assert answer.status_code == status and message in answer.json()["error"]["message"]
    assert models.lora_requests == before
    assert ask(served, CHAT, conversation(factories.QUESTIONS[0])).status_code == 200


def test_a_bundle_that_vllm_cannot_load_is_refused_whole(running: Any) -> None:
    served, _, models = running
    before = dict(models.lora_requests)
    models.broken = "cram-g1"
    answer = ask(served, "/v1/cram/bundle", {"name": "more"}, ADMIN)
    assert answer.status_code == 400 and "is greater than max_lora_rank" in answer.text
    assert models.lora_requests == before
    assert ask(served, CHAT, {**conversation("x"), "model": "cram:newest"}).status_code == 400


def test_without_a_token_no_bundle_is_taken(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CRAM_ADMIN_TOKEN")
    assert ask(running[0], "/v1/cram/bundle", {"name": "more"}, ADMIN).status_code == 404


def test_the_start_fails_with_another_base(
    running: Any, monkeypatch: pytest.MonkeyPatch, place: Path, tmp_path: Path
) -> None:
    app = SimpleNamespace(state=SimpleNamespace(openai_serving_models=running[2]))
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "lifespan.startup"}

    async def send(message: Any) -> None:
        sent.append(message)

    monkeypatch.setenv("CRAM_CLIP", str(place / "clip"))
    for bundle, kind in (("of_another_base", "failed"), ("more", "complete")):
        folder = tmp_path / "bundles" / bundle
        export_groups(folder, place / "out")
        monkeypatch.setenv("CRAM_BUNDLE", str(folder))
        asyncio.run(CramMiddleware(FakeVllm())({"type": "lifespan", "app": app}, receive, send))
        assert sent[-1]["type"] == f"lifespan.startup.{kind}", sent
    assert "model must be the base that" in sent[0]["message"]
