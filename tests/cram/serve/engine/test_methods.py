"""The engine with every method: those with gatings and solo experts, and those that must be told the task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cram.attach import attach
from cram.bundle.bundle import load, save
from cram.methods import METHODS
from cram.serve.engine.engine import Engine
from cram.serve.engine.limits import Limits
from tests.cram import factories, runs
from tests.cram.serve.serving import ask, llava_prompt, offline, run

TOLD = [name for name, method in METHODS.items() if method.told_task]


def learnt(method: str, folder: Path) -> tuple[Any, Any]:
    """A model with two short tasks, and its processor."""
    learner = runs.learner(folder / "run", method)
    for index in range(2):
        learner.learn(index)
    return learner.model.eval(), factories.llava_processor()


@pytest.mark.parametrize("method", sorted(METHODS.keys() - set(TOLD)))
def test_every_method_answers_as_offline_in_mixed_batches(method: str, tmp_path: Path) -> None:
    model, processor = learnt(method, tmp_path)
    cram, first = model.cram, model.cram.expert_names[0]
    asked = [
        llava_prompt(processor, "Which colour", 0),
        llava_prompt(processor, "Choose the letter of the right option: A or B", 51, 52),
        llava_prompt(processor, "Which colour?", 2),
        llava_prompt(processor, "Choose the letter of the right option: A or B?"),
    ]
    mixtures: list[dict[str, float] | None] = [None, None, {first: 1.0}, None, {}]
    asked.append(asked[0])
    contexts = [None, None, cram.forced(first), None, cram.disabled()]
    lengths = [25, 12, 20, 16, 20]
    expected = [offline(model, *case) for case in zip(asked, lengths, contexts, strict=True)]
    # Pieces are for methods whose gates are the route's; the others read a prompt whole.
    engine = Engine(model, processor, Limits(piece=8))
    pairs = [
        ask(each, mixture, max_tokens=length)
        for each, mixture, length in zip(asked, mixtures, lengths, strict=True)
    ]
    for request, _ in pairs:
        engine.submit(request)
        engine.turn()
    run(engine, *(heard for _, heard in pairs))
    assert [heard.choices[0].token_ids for _, heard in pairs] == expected


@pytest.mark.parametrize("method", TOLD)
def test_a_method_that_cannot_choose_asks_for_the_experts(method: str, tmp_path: Path) -> None:
    model, processor = learnt(method, tmp_path)
    asked = llava_prompt(processor, "Which colour", 0)
    name = model.cram.expert_names[1]
    expected = offline(model, asked, 8, model.cram.forced(name))
    engine = Engine(model, processor)
    automatic, silent = ask(asked)
    named, heard = ask(asked, {name: 1.0})
    engine.submit(automatic)
    engine.submit(named)
    run(engine, silent, heard)
    assert silent.failed is not None and silent.failed.fault == "request"
    assert "lora must name the experts" in silent.failed.message
    assert heard.choices[0].token_ids == expected


@pytest.mark.parametrize("method", ["moelora", "hide"])
def test_a_change_waits_where_two_versions_cannot_be_held(method: str, tmp_path: Path) -> None:
    model, processor = learnt(method, tmp_path)
    save(model, tmp_path / "two")
    clip = factories.clip_model()
    fresh = factories.llava(clip=clip)
    attach(fresh, model.cram.config, factories.clip_encoder(fresh, clip), processor)
    asked = llava_prompt(processor, "Which colour", 0)
    bare, taught = offline(fresh, asked, 15), offline(model, asked, 15)
    assert bare != taught
    engine = Engine(fresh.eval(), processor)
    first, before = ask(asked, max_tokens=15)
    second, after = ask(asked, max_tokens=15)
    engine.submit(first)
    engine.turn()
    change = engine.replace(lambda: load(fresh, tmp_path / "two"))
    engine.submit(second)
    engine.turn()
    assert not change.done() and after.started is None
    run(engine, before, after)
    assert change.result(0).number == 2
    assert before.choices[0].token_ids == bare
    assert after.choices[0].token_ids == taught
    engine.roll_back()
    third, again = ask(asked, max_tokens=15)
    engine.submit(third)
    run(engine, again)
    assert again.choices[0].token_ids == bare
