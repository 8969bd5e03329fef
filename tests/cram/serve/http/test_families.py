"""The official client against every family: 50 requests at once, each with the answer that it gets alone."""

from __future__ import annotations

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cram.bundle.bundle import load
from cram.bundle.runs import newest_bundle
from cram.commands.serve import learn_first
from cram.loading import Sources
from cram.serve.engine.limits import Limits
from cram.streams import load_stream
from cram.streams.types import open_images
from tests.cram.factories import MODELS
from tests.cram.model.test_every_family import SAMPLES, Samples, routed
from tests.cram.serve.engine.test_prefill import family_prompt
from tests.cram.serve.http.running import serving
from tests.cram.serve.serving import offline

openai = pytest.importorskip("openai", reason="the official client is not installed")
LENGTHS = (3, 17, 9)


def content(question: str, images: list[Any]) -> list[dict[str, Any]]:
    """The parts of a message."""
    parts: list[dict[str, Any]] = []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return [*parts, {"type": "text", "text": question}]


def asked(client: Any, samples: Samples, number: int) -> tuple[list[str], list[list[str]], int]:
    """Texts, tokens and group of one request; every second one is streamed."""
    messages = [{"role": "user", "content": content(*samples[number % len(samples)])}]
    fields: dict[str, Any] = {
        "model": "cram",
        "messages": messages,
        "n": 1 + number % 2,
        "max_completion_tokens": LENGTHS[number % len(LENGTHS)],
        "logprobs": True,
    }
    texts, tokens = [""] * fields["n"], [[] for _ in range(fields["n"])]  # type: ignore[var-annotated]
    if number % 4 < 2:
        reply = client.chat.completions.create(**fields)
        for choice in reply.choices:
            texts[choice.index] = choice.message.content
            tokens[choice.index] = [each.token for each in choice.logprobs.content]
        return texts, tokens, reply.model_extra["cram"]["group"]
    group = None
    for chunk in client.chat.completions.create(**fields, stream=True):
        group = chunk.model_extra["cram"]["group"] if "cram" in (chunk.model_extra or {}) else group
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            tokens[choice.index] += (
                [each.token for each in choice.logprobs.content] if choice.logprobs else []
            )
    assert group is not None
    return texts, tokens, group


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODELS))
def test_fifty_requests_at_once_get_their_offline_answers(name: str) -> None:
    assert fifty(*routed(name)[:2], SAMPLES, piece=16) == {0, 1}


@pytest.mark.slow
def test_fifty_requests_about_the_built_in_tasks(tmp_path: Path) -> None:
    learn_first(tmp_path, "cpu", limit=40, max_steps=10, batch_size=8, eval_batch_size=40)
    model, processor, encoder = Sources("builtin").load("cpu")
    load(model, newest_bundle(tmp_path)[0], encoder, processor)
    tests = [sample for task in load_stream("builtin", limit=2).tasks for sample in task.test[:2]]
    samples = [(sample.instruction, open_images(sample)) for sample in tests]
    assert len(fifty(model, processor, samples, piece=64)) > 1


def fifty(model: Any, processor: Any, samples: Samples, piece: int) -> set[int]:
    """Send 50 requests at once and compare every answer with the offline one; returns the groups."""
    cram, alone = model.cram, []
    for sample in samples:
        prompt = family_prompt(processor, *sample)
        route = cram.route(cram.encode([prompt.instruction], [list(prompt.images)]))
        assert route.groups is not None
        ids = offline(model, prompt, max(LENGTHS), cram.fixed(route), [processor.tokenizer.eos_token_id])
        alone.append((ids, int(route.groups[0])))
    with (
        serving(Limits(rows=24, piece=piece), made=(model, processor)) as (client, *_),
        openai.OpenAI(base_url=f"{client.base}/v1", api_key="none") as official,
        ThreadPoolExecutor(50) as pool,
    ):
        found = list(pool.map(lambda number: asked(official, samples, number), range(50)))
    for number, (texts, tokens, group) in enumerate(found):
        ids, expected_group = alone[number % len(samples)]
        ids = ids[: LENGTHS[number % len(LENGTHS)]]
        assert group == expected_group
        assert tokens == [[processor.tokenizer.decode([each]) for each in ids]] * (1 + number % 2)
        text = processor.tokenizer.decode(ids, skip_special_tokens=True).lstrip()
        assert texts == [text] * (1 + number % 2)
    return {group for _, _, group in found}
