"""One command from a bundle to answers: `cram serve --engine vllm`, asked by the official client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from cram.learning.answers.prompts import chat_text, message
from cram.serve.vllm.group import encode
from tests.cram import factories
from tests.cram.serve.vllm.real import checkpoints
from tests.cram.serve.vllm.real.reference import answer_logprobs
from tests.cram.serve.vllm.real.servers import (
    PORT,
    Served,
    automatic,
    body,
    check_routed,
    post,
    read,
    read_all,
    running,
)
from tests.cram.serve.vllm.real.worlds import EXPLICIT

URL = f"http://127.0.0.1:{PORT}/v1"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A running server."""
    made = Served(tmp_path_factory.mktemp("served"))
    command = made.command("--bundles", str(made.more_bundles()), "--port", str(PORT))
    with running(command, PORT, made.place / "log", CRAM_ADMIN_TOKEN="open"):
        yield made


def test_prompts_are_those_of_training(served: Served) -> None:
    for model in ("cram", "base"):
        prompt, _, _ = read(post(body(model, 0, (0,))))
        text = chat_text(served.processor, [message("user", checkpoints.QUESTIONS[0], 1)])
        wanted = served.processor(text=[text], images=[factories.image(0)], return_tensors="pt")
        assert prompt == wanted["input_ids"][0].tolist()


def test_eight_requests_at_once_are_routed_as_in_process(served: Served) -> None:
    check_routed(served, PORT)


def test_the_official_client_needs_no_change(served: Served) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=URL, api_key="sesame")
    assert {"cram", "cram:task0", "base"} <= {model.id for model in client.models.list()}
    asked = body("cram", 0, (0,))
    plain = {name: asked[name] for name in ("model", "messages", "max_tokens", "temperature")}
    answer = client.chat.completions.with_raw_response.create(**plain)
    assert answer.headers["x-cram-mode"] == "automatic"
    whole = answer.parse().choices[0].message.content
    pieces = [
        chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**plain, stream=True)
    ]
    assert "".join(pieces) == whole


def test_each_of_several_answers_has_the_gates_of_the_request(served: Served) -> None:
    asked = body("cram", 0, (0,), n=3, temperature=1.0, seed=3)
    prompt, answers = read_all(post(asked))
    assert len(answers) == 3 and len({tuple(tokens) for tokens, _ in answers}) > 1
    for place, (tokens, found) in enumerate(answers):
        wanted = automatic(served, prompt, tokens, (0,)).sort(-1, descending=True).values
        assert (wanted - found).abs().max() < EXPLICIT
        # The seeds of the answers follow one another.
        assert read(post({**asked, "n": 1, "seed": 3 + place}))[1] == tokens


@pytest.mark.parametrize("model", ["cram", "cram:task1", "base"])
def test_several_greedy_answers_are_equal(served: Served, model: str) -> None:
    _, (first, second) = read_all(post(body(model, 0, (0,), n=2)))
    assert first[0] == second[0] == read(post(body(model, 0, (0,))))[1]


def test_streams_of_several_answers_end_at_their_stops(served: Served) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=URL, api_key="sesame")
    asked: dict[str, Any] = {"model": "cram", "messages": body("cram", 0, (0,))["messages"]}
    asked |= {"n": 3, "seed": 7, "temperature": 1.0, "max_tokens": 12, "stop": ["e"], "logprobs": True}
    whole = client.chat.completions.create(**asked).choices
    texts, ends, counts = [""] * 3, [""] * 3, [0] * 3
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            ends[choice.index] = choice.finish_reason or ends[choice.index]
            counts[choice.index] += len((choice.logprobs and choice.logprobs.content) or [])
    assert texts == [choice.message.content for choice in whole] and not any("e" in text for text in texts)
    assert ends == [choice.finish_reason for choice in whole] and "stop" in ends
    assert counts == [len(choice.logprobs.content) for choice in whole]


def test_a_refused_request_spoils_no_other_with_its_picture(served: Served) -> None:
    assert post(body("cram", 0, (41,), temperature=-1)).status_code == 400
    assert post(body("cram", 0, (41,))).status_code == 200


def test_explicit_gates_are_those_of_the_router(served: Served) -> None:
    first = post(body("cram", 0, (0,)))
    name = first.headers["x-cram-adapter"]
    route = served.handle.route(served.handle.encode([checkpoints.QUESTIONS[0]], [[factories.image(0)]]))
    gates = route.gates[:, 0, served.handle.method.router.experts_of(0)].numpy()
    again = post(body(name, 0, (0,), vllm_xargs={"cram_gates": encode(gates)}))
    reverse = post(body(name, 0, (0,), vllm_xargs={"cram_gates": encode(gates[::-1])}))
    assert (read(first)[2] - read(again)[2]).abs().max() < EXPLICIT
    assert (read(first)[2] - read(reverse)[2]).abs().max() > 0.01


def test_clients_name_experts(served: Served) -> None:
    alone = post(body("cram:task1", 0, (0,)))
    prompt, tokens, found = read(alone)
    pixels = dict(served.processor.image_processor(images=[factories.image(0)], return_tensors="pt"))
    with served.handle.forced("task1"):
        wanted = answer_logprobs(served.model, prompt, tokens, pixels)
    assert (wanted.sort(-1, descending=True).values - found).abs().max() < EXPLICIT
    assert post(body("cram", 0, (0,), lora=[])).headers["x-cram-mode"] == "base"


def picture(url: str | None) -> list[dict[str, Any]]:
    """Messages with a picture that cannot be had."""
    given = {} if url is None else {"url": url}
    return [{"role": "user", "content": [{"type": "image_url", "image_url": given}]}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "GROUP"}, "'cram_gates' must be base64"),
        ({"model": "GROUP", "vllm_xargs": {"cram_gates": "A" * 8_000_000}}, "'cram_gates' must be base64"),
        ({"model": "base", "vllm_xargs": {"cram_gates": [1.0]}}, "must come with the adapter of a group"),
        ({"use_beam_search": True, "n": 2}, "use_beam_search must be left out"),
        ({"messages": 3}, "messages must be a list"),
        ({"messages": picture("data:image/png;base64,AAAA")}, "an image must be a whole picture"),
        ({"messages": picture("http://127.0.0.1/a.png")}, "an image must be a data URL in base64"),
        ({"messages": picture(None)}, "an image must be a data URL in base64"),
    ],
)
def test_bad_requests_are_400_and_the_server_goes_on(
    served: Served, change: dict[str, Any], message: str
) -> None:
    group = post(body("cram", 0, ())).headers["x-cram-adapter"]
    changed = {name: group if value == "GROUP" else value for name, value in change.items()}
    answer = post({**body("cram", 0, ()), **changed})
    assert answer.status_code == 400 and message in answer.text, answer.text[:500]
    assert post(body("cram", 0, ())).status_code == 200


def test_the_key_is_checked(served: Served) -> None:
    assert post(body("cram", 0, (0,)), key="wrong").status_code == 401


def test_a_bad_bundle_is_refused_and_a_good_one_joins(served: Served) -> None:
    before = read(post(body("cram", 0, (0,))))
    reasons = {"damaged": "must be a bundle", "large": "max_lora_rank", "of_another_base": "must be the base"}
    for name, reason in reasons.items():
        refused = post({"name": name}, "/cram/bundle", "open")
        assert refused.status_code == 400 and "the one before stays" in refused.text
        assert reason in refused.text, refused.text
        assert read(post(body("cram", 0, (0,))))[1] == before[1]
    joined = post({"name": "more"}, "/cram/bundle", "open")
    assert joined.status_code == 200 and "newest" in joined.json()["experts"], joined.text
    after = read(post(body("cram", 0, (0,))))
    assert torch.equal(after[2], before[2]) or (after[2] - before[2]).abs().max() < EXPLICIT
    new = post(body("cram:newest", 1, (0,)))
    assert new.status_code == 200 and new.headers["x-cram-group"] == "1"
    assert np.isfinite(read(new)[2].numpy()).all()
