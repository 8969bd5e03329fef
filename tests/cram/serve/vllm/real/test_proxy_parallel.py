"""The router as a proxy, before a server of two ranks that `examples/vllm/tensor_parallel.yaml` sets up."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cram.base import base_folder
from tests.cram.serve.vllm.real.servers import Served, body, check_routed, post, read, read_all, running

SERVER, PROXY = 8733, 8734
CONFIG = Path(__file__).resolve().parents[5] / "examples/vllm/tensor_parallel.yaml"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The server without a router, and the proxy before it."""
    made = Served(tmp_path_factory.mktemp("served"))
    command = made.command("--no-router", "--port", str(SERVER), flags=["--config", str(CONFIG)])
    proxy = [sys.executable, "-m", "cram.serve.vllm.front.proxy", "--port", str(PROXY)]
    proxy += ["--upstream", f"http://127.0.0.1:{SERVER}"]
    settings = {
        "CRAM_BUNDLE": str(made.place / "bundle"),
        "CRAM_EXPORT": str(made.place / "bundle-vllm"),
        "CRAM_CLIP": str(base_folder() / "clip"),
        "CRAM_ADMIN_TOKEN": "",
    }
    with (
        running(command, SERVER, made.place / "log"),
        running(proxy, PROXY, made.place / "proxy", **settings),
    ):
        yield made


def test_eight_requests_at_once_are_routed_as_in_process(served: Served) -> None:
    check_routed(served, PROXY)


def test_streams_and_several_answers_pass_the_proxy(served: Served) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=f"http://127.0.0.1:{PROXY}/v1", api_key="sesame")
    assert {"cram", "cram:task0", "base"} <= {model.id for model in client.models.list()}
    asked: dict[str, Any] = {"model": "cram", "messages": body("cram", 0, (0,))["messages"]}
    asked |= {"n": 2, "seed": 3, "temperature": 1.0, "max_tokens": 6}
    whole = client.chat.completions.create(**asked).choices
    texts = [""] * 2
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole]
    _, (first, second) = read_all(post(body("cram", 0, (0,), n=2), port=PROXY))
    assert first[0] == second[0]


def test_the_proxy_refuses_what_the_server_refuses(served: Served) -> None:
    assert post(body("cram", 0, (0,)), key="wrong", port=PROXY).status_code == 401
    assert post(body("cram", 0, (0,), temperature=-1), port=PROXY).status_code == 400
    assert post({"name": "bundle"}, "/cram/bundle", port=PROXY).status_code == 404
    # Only the router knows the mixture.
    assert post(body("cram", 0, (0,)), port=SERVER).status_code == 404


def test_a_client_that_leaves_stops_the_computing(served: Served) -> None:
    asked = body("cram", 0, (0,), max_tokens=150, stream=True)
    head = {"authorization": "Bearer sesame"}
    url = f"http://127.0.0.1:{PROXY}/v1/chat/completions"
    with httpx.stream("POST", url, json=asked, headers=head, timeout=600) as answer:
        assert answer.status_code == 200 and next(answer.iter_lines())
    assert len(read(post(body("cram", 0, (0,)), port=PROXY))[1]) == 6
    metrics = httpx.get(f"http://127.0.0.1:{SERVER}/metrics", headers=head).text
    running_now = [line for line in metrics.splitlines() if line.startswith("vllm:num_requests_running")]
    assert running_now and all(float(line.rsplit(" ", 1)[1]) == 0 for line in running_now)
