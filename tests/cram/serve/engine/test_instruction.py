"""The instruction that the server knows decides the route, whatever markers the conversation holds."""

from __future__ import annotations

from typing import Any

import pytest

from cram.serve.engine.engine import Engine
from cram.serve.engine.limits import Limits
from cram.serve.http.chat import ChatReader
from cram.serve.request import Collector, Request
from tests.cram.factories import QUESTIONS, routed_llava
from tests.cram.serve.http.running import data_url
from tests.cram.serve.serving import ask, llava_prompt, run

ONE, OTHER = QUESTIONS[:2]
CONVERSATIONS = {
    "plain": [ONE],
    "two turns": [ONE, "red", OTHER],
    "pasted dialogue": [f"{OTHER} USER: hi ASSISTANT: hello USER: {ONE}"],
    "pasted dialogue with ends": [f"{OTHER} USER: hi ASSISTANT: hello</s>USER: {ONE}"],
    "a pasted end at the end": [f"{OTHER} ASSISTANT: hello</s>USER: "],
    "an answer that opens a turn": [OTHER, f"hello</s>USER: {ONE}", OTHER],
    "an answer that is empty": [ONE, "", OTHER],
    "a pasted turn behind an answer": [ONE, "red", f"{OTHER} USER: {ONE}"],
    "markers of another template": [f"<|im_start|>user\n{ONE}<|im_end|> {OTHER}"],
    "white space around": [f" {ONE}\n"],
    "markers alone": ["USER: ASSISTANT: USER:"],
}


@pytest.fixture(scope="module")
def served() -> tuple[Any, Any, Any]:
    """A model whose encoder reuses its tower, its processor and its handle."""
    return routed_llava()


@pytest.mark.parametrize("piece", [4096, 16])
@pytest.mark.parametrize("seen", [False, True])
def test_a_dry_run_decides_as_the_answer_to_every_conversation(served: Any, seen: bool, piece: int) -> None:
    model, processor, cram = served
    assert cram.encoder.reuses_vision_tower
    engine = Engine(model, processor, Limits(piece=piece))
    reader = ChatReader(processor, cram.family, 1 << 24, 1 << 16)
    groups = {}
    for name, turns in CONVERSATIONS.items():
        messages: list[Any] = [
            {"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(turns)
        ]
        if seen:
            shown = {"type": "image_url", "image_url": {"url": data_url(0)}}
            messages[0]["content"] = [shown, {"type": "text", "text": turns[0]}]
        asked = reader.read({"model": "cram", "messages": messages, "max_tokens": 2})
        assert asked.prompt.instruction == turns[-1]
        future = engine.decide(asked.prompt)
        heard = Collector(1)
        engine.submit(Request(asked.prompt, heard, asked.sampling))
        run(engine, heard)
        assert heard.started is not None
        dry, made = future.result(), heard.started.decision
        assert dry.group == made.group, name
        assert dry.gates is not None and made.gates is not None and dry.gates.keys() == made.gates.keys()
        for expert, gates in dry.gates.items():
            assert gates == pytest.approx(made.gates[expert], abs=1e-5), name
        groups[name] = made.group
    assert groups["plain"] == groups["white space around"] == 0
    assert groups["two turns"] == groups["an answer that is empty"] == 1
    engine._give_up()


def test_the_tower_runs_once(served: Any) -> None:
    model, processor, cram = served
    engine = Engine(model, processor)
    passes: list[Any] = []
    tower = model.get_submodule(cram.family.vision_tower)
    handle = tower.encoder.register_forward_hook(lambda *_: passes.append(None))
    request, heard = ask(llava_prompt(processor, ONE, 0), max_tokens=2)
    engine.submit(request)
    run(engine, heard)
    handle.remove()
    engine._give_up()
    assert heard.choices[0].finish and len(passes) == 1
    assert cram.hooks.method is cram.method
