"""Answers from outside of a stream: those of the evaluation, alone and together, and how they were routed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import cram
from cram.config import CramConfig
from cram.learning.answers.predict import Conversation, Turn, answer, answer_all, conversation_prompt
from cram.learning.batches import build_prompt
from cram.loading import load_processor
from cram.scoring.scorers import read_predictions
from tests.cram import factories, runs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CRAM run over two tasks, not to be written to."""
    folder = tmp_path_factory.mktemp("predict") / "run"
    runs.learner(folder).run()
    return folder


@pytest.fixture(scope="module")
def model(run: Path) -> Any:
    """A model with the newest state of the run."""
    base, encoder = factories.fresh()
    cram.load(base, run, encoder, factories.llava_processor())
    return base


def test_load_takes_the_newest_state_of_a_run(run: Path, model: Any) -> None:
    assert model.cram.expert_names == ["colour", "letter"]
    other, encoder = factories.fresh()
    newest = cram.load(other, run / "tasks/02-letter/bundle", encoder)
    for index in range(2):
        expected = newest.expert_weights(index)
        for path, pair in model.cram.expert_weights(index).items():
            assert all(torch.equal(a, b) for a, b in zip(pair, expected[path], strict=True))


def test_a_run_without_a_trained_task_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes((run / "run.json").read_bytes())
    base, encoder = factories.fresh()
    with pytest.raises(ValueError, match="must have a trained task, got none"):
        cram.load(base, tmp_path, encoder)
    assert not hasattr(base, "cram")


def test_answers_are_those_of_the_evaluation_with_group_and_gates(run: Path, model: Any) -> None:
    for index, task in enumerate(runs.two_tasks().tasks):
        file = run / "tasks/02-letter/predictions" / f"{index + 1:02d}-{task.name}.jsonl"
        expected = list(read_predictions(file).values())
        chats = [[Turn.of(sample.instruction, sample.images)] for sample in task.test]
        found = answer_all(model, chats, max_new_tokens=3)
        assert [each.text for each in found] == expected
        query = model.cram.encode(
            [sample.instruction for sample in task.test], [list(sample.images) for sample in task.test]
        )
        route = model.cram.route(query)
        for row, each in enumerate(found):
            assert route.groups is not None and each.group == int(route.groups[row])
            assert each.gates is not None and list(each.gates) == ["colour", "letter"]
            gates = route.gates[:, row].double().mean(0)
            torch.testing.assert_close(torch.tensor(list(each.gates.values())).double(), gates)
            assert each.routing().startswith(f"group {each.group}; ")


def test_one_question_is_answered_as_among_many(model: Any, tmp_path: Path) -> None:
    task = runs.two_tasks().tasks[0]
    chats = [[Turn.of(sample.instruction, sample.images)] for sample in task.test]
    together = answer_all(model, chats, max_new_tokens=3)
    picture = tmp_path / "x.png"
    for sample, expected in zip(task.test, together, strict=True):
        sample.images[0].save(picture)  # type: ignore[union-attr]
        found = model.cram.answer(str(picture), sample.instruction, max_new_tokens=3)
        assert found.text == expected.text and str(found) == found.text and found.group == expected.group
        assert found.gates == pytest.approx(expected.gates, abs=1e-6)


def test_an_expert_by_name_answers_alone(model: Any) -> None:
    found = model.cram.answer(factories.image(1), "Which colour", expert="letter", max_new_tokens=2)
    assert found.group is None and found.gates == {"colour": 0.0, "letter": 1.0}
    with pytest.raises(ValueError, match=r"expert must be one of \['colour', 'letter'\]"):
        model.cram.answer(factories.image(1), "Which colour", expert="nobody")


def test_every_module_keeps_its_own_mode(model: Any) -> None:
    model.train()
    model.model.vision_tower.eval()
    before = [module.training for module in model.modules()]
    assert True in before and False in before
    answer(model, "Which colour", factories.image(0), max_new_tokens=1)
    assert [module.training for module in model.modules()] == before
    model.eval()


def test_a_family_without_clip_is_routed_by_its_own_query(run: Path, tmp_path: Path) -> None:
    folder = runs.save_checkpoint("qwen2_5_vl", tmp_path / "qwen")
    base = factories.MODELS["qwen2_5_vl"]()
    handle = cram.attach(base, CramConfig(sigma=1.0), factories.clip_encoder(base), load_processor(folder))
    query = handle.encode(["How many?"], [[factories.image(0)]])
    handle.method.router.groups.observe("one", query.text)
    for index, name in enumerate(("one", "two")):
        centroid = query.image[0] + index
        handle.method.add_expert(name, factories.expert_weights(handle, index), 0, centroid, trained=False)
    gates = handle.route(query).gates.double().mean((0, 1)).tolist()
    found = handle.answer([factories.image(0)], "How many?", max_new_tokens=2)
    assert found.group == 0
    assert list((found.gates or {}).values()) == pytest.approx(gates) and gates[0] > gates[1] > 0


def test_a_method_that_is_told_the_task_must_be_told_it(tmp_path: Path) -> None:
    learner = runs.learner(tmp_path, "isolated")
    learner.learn(0)
    with pytest.raises(ValueError, match="expert must be named for the method 'isolated'"):
        learner.cram.answer(factories.image(0), "Which colour")
    assert learner.cram.answer(factories.image(0), "Which colour", expert="colour").gates == {"colour": 1.0}


def test_gates_that_every_layer_makes_are_not_reported(tmp_path: Path) -> None:
    learner = runs.learner(tmp_path, "moelora")
    learner.learn(0)
    found = learner.cram.answer(factories.image(0), "Which colour", max_new_tokens=2)
    assert found.gates == {} and found.routing() == "no expert by a gate of its own"


@pytest.mark.parametrize("question", ["", "  \n", None])
def test_a_question_that_says_nothing_is_refused(model: Any, question: Any) -> None:
    with pytest.raises(ValueError, match="question must be a non-empty string"):
        model.cram.answer(factories.image(0), question)


def test_a_placeholder_in_a_question_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="must not contain '<image>'"):
        model.cram.answer(factories.image(0), "What is <image>?")


def test_a_question_without_a_picture_is_answered(model: Any) -> None:
    found = model.cram.answer(None, "Which colour", max_new_tokens=2)
    assert sorted((found.gates or {}).values())[-1] == 1.0


def test_the_prompt_of_one_turn_is_the_one_of_training(tmp_path: Path) -> None:
    templated = load_processor(runs.save_checkpoint("qwen2_5_vl", tmp_path / "qwen"))
    for processor in (factories.llava_processor(), templated):
        turn = Turn.of("How many?", [factories.image(0)])
        assert conversation_prompt(processor, [turn]) == build_prompt(processor, "How many?", 1)


def test_the_prompt_of_a_conversation_holds_every_turn_once(tmp_path: Path) -> None:
    turns = [Turn("First?", (factories.image(0),), "one"), Turn("Second?")]
    plain = conversation_prompt(factories.llava_processor(), turns)
    assert plain == "USER: <image>\nFirst? ASSISTANT: one</s>USER: Second? ASSISTANT:"
    templated = load_processor(runs.save_checkpoint("qwen2_5_vl", tmp_path / "qwen"))
    assert conversation_prompt(templated, turns) == (
        "<|im_start|>user\n<vision_start><image><vision_end>First?<|im_end|>\n"
        "<|im_start|>assistant\none<|im_end|>\n"
        "<|im_start|>user\nSecond?<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(ValueError, match="at least one question"):
        conversation_prompt(templated, [])


def test_a_conversation_keeps_its_pictures_and_routes_by_the_newest_question(model: Any) -> None:
    picture = factories.image(0)
    chat = Conversation(model, max_new_tokens=2)
    first = chat.ask("Which colour", picture)
    assert first == answer(model, "Which colour", picture, max_new_tokens=2)
    second = chat.ask("Choose the letter of the right option: A or B")
    route = model.cram.route(
        model.cram.encode(["Choose the letter of the right option: A or B"], [[picture]])
    )
    assert route.groups is not None and second.group == int(route.groups[0])
    assert [turn.answer for turn in chat.turns] == [first.text, second.text]
    with pytest.raises(ValueError, match="non-empty"):
        chat.ask(" ")
    assert len(chat.turns) == 2


def test_a_conversation_that_fills_the_context_is_refused(model: Any) -> None:
    room = 511 - len("sUSER:  ASSISTANT:")
    answer(model, "x" * room, max_new_tokens=1)
    with pytest.raises(ValueError, match=r"prompt must leave room for an answer in 512 tokens, got 512"):
        answer(model, "x" * (room + 1), max_new_tokens=1)


def test_the_checkpoints_own_generation_settings_decide_nothing(model: Any) -> None:
    def ask() -> str:
        return str(model.cram.answer(factories.image(0), "Which colour?", max_new_tokens=6))

    plain = ask()
    own = model.generation_config
    changes = {"repetition_penalty": 8.0, "no_repeat_ngram_size": 1, "min_new_tokens": 6, "do_sample": True}
    changes |= {"suppress_tokens": list(range(20, 300)), "num_beams": 3}
    for name, value in changes.items():
        before = getattr(own, name)
        setattr(own, name, value)
        assert ask() == plain, name
        setattr(own, name, before)
