"""Experts that change while answers are in flight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cram.bundle.bundle import load, save
from cram.serve.engine.engine import Engine
from tests.cram.factories import QUESTIONS, expert_weights, image, routed_llava
from tests.cram.serve.serving import ask, llava_prompt, offline, run


def grown() -> tuple[Any, Any, Any]:
    """The routed LLaVA after one more task in group 0."""
    model, processor, cram = routed_llava()
    query = cram.encode(QUESTIONS[:1], [[image(0)]])
    cram.method.add_expert("newest", expert_weights(cram, 9), 0, query.image[0], trained=False)
    return model, processor, cram


def damage(folder: Path) -> None:
    """Cut an expert's file."""
    file = next((folder / "experts" / "old").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])


def test_answers_in_flight_keep_their_experts(tmp_path: Path) -> None:
    model, processor, cram = routed_llava()
    later, _, _ = grown()
    save(later, tmp_path / "four")
    asked = [llava_prompt(processor, QUESTIONS[0], 0), llava_prompt(processor, QUESTIONS[0], 5)]
    three = [offline(model, each, 30) for each in asked]
    four = [offline(later, each, 30) for each in asked]
    assert three != four
    engine = Engine(model, processor)
    first, heard_first = ask(asked[0], max_tokens=30)
    engine.submit(first)
    for _ in range(4):
        engine.turn()
    change = engine.replace(lambda: load(model, tmp_path / "four"))
    pairs = [ask(each, max_tokens=30) for each in asked]
    for request, _ in pairs:
        engine.submit(request)
    engine.turn()
    assert change.result(0).names == ("old", "other", "new", "newest")
    assert not heard_first.done.is_set()
    run(engine, heard_first, *(heard for _, heard in pairs))
    assert heard_first.choices[0].token_ids == three[0]
    assert [heard.choices[0].token_ids for _, heard in pairs] == four
    numbers = [heard.started.decision.bundle for _, heard in pairs if heard.started]
    assert numbers == [2, 2]
    back = engine.roll_back()
    last, heard = ask(asked[1], max_tokens=30)
    engine.submit(last)
    run(engine, heard)
    assert back.result(0).number == 1 and cram.expert_names == ["old", "other", "new"]
    assert heard.choices[0].token_ids == three[1]


def test_a_damaged_bundle_leaves_the_experts_as_they_were(tmp_path: Path) -> None:
    model, processor, cram = routed_llava()
    save(model, tmp_path / "bad")
    damage(tmp_path / "bad")
    asked = llava_prompt(processor, QUESTIONS[0], 0)
    expected = offline(model, asked, 12)
    engine = Engine(model, processor)
    change = engine.replace(lambda: load(model, tmp_path / "bad"))
    request, heard = ask(asked, max_tokens=12)
    engine.submit(request)
    run(engine, heard)
    with pytest.raises(ValueError, match="old"):
        change.result(0)
    assert engine.versions.current.number == 1
    assert heard.choices[0].token_ids == expected
    with pytest.raises(ValueError, match="a bundle must have been replaced"):
        back = engine.roll_back()
        engine.turn()
        back.result(0)


def test_a_load_that_fails_in_an_unforeseen_way_leaves_the_experts_as_they_were() -> None:
    model, processor, cram = routed_llava()
    engine = Engine(model, processor)
    before = {path: module.experts for path, module in cram.modules.items()}

    def fails() -> None:
        raise ArithmeticError("unforeseen")

    change = engine.replace(fails)
    with pytest.raises(ArithmeticError):
        engine.turn()
    with pytest.raises(RuntimeError, match="the call has failed"):
        change.result(0)
    assert all(module.experts is before[path] for path, module in cram.modules.items())
    assert cram.method.router.expert_names == cram.expert_names == ["old", "other", "new"]


def test_a_step_copies_one_column() -> None:
    model, processor, _ = routed_llava()
    engine = Engine(model, processor)
    for seed in range(3):
        engine.submit(ask(llava_prompt(processor, QUESTIONS[0], seed), max_tokens=12)[0])
    for _ in range(4):
        engine.turn()
    batch = next(iter(engine._worker._batches.values()))
    tensors = [layer.keys for layer in batch._cache.layers]
    before = [tensor.clone() for tensor in tensors]
    column = batch._cache.end
    engine.turn()
    assert all(layer.keys is tensor for layer, tensor in zip(batch._cache.layers, tensors, strict=True))
    for old, new in zip(before, tensors, strict=True):
        changed = (old != new).any(dim=(0, 1, 3)).nonzero().flatten().tolist()
        assert changed == [column]
    assert torch.isfinite(tensors[0]).all()
