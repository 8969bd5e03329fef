"""Prompts that are read in pieces: equal answers, and tokens for the others in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cram.serve.engine.engine import Engine
from cram.serve.engine.limits import Limits
from cram.serve.engine.prefill import piece_tokens, sliced
from cram.serve.engine.worker import PATIENCE
from cram.serve.request import Prompt
from tests.cram.factories import MODELS, QUESTIONS, routed_llava
from tests.cram.model.test_every_family import SAMPLES, routed
from tests.cram.serve.serving import ask, llava_prompt, offline, run

LONG = "Say what can be seen, in the order in which it is seen. " * 6


def family_prompt(processor: Any, question: str, images: list[Any]) -> Prompt:
    """A question in the form of a family's own template."""
    from cram.learning.batches import build_prompt

    text = build_prompt(processor, question, len(images))
    inputs = dict(processor(text=[text], images=images or None, return_tensors="pt"))
    return Prompt(lambda: inputs, question, tuple(images))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_pieces_give_the_numbers_of_the_whole_prompt(name: str) -> None:
    model, processor, cram = routed(name)
    asked = [family_prompt(processor, *sample) for sample in SAMPLES]
    expected = []
    for each in asked:
        route = cram.route(cram.encode([each.instruction], [list(each.images)]))
        expected.append(offline(model, each, 12, cram.fixed(route)))
    scores = []
    for piece in (1 << 20, 5):
        engine = Engine(model, processor, Limits(piece=piece))
        pairs = [ask(each, max_tokens=12, logprobs=5) for each in asked]
        for request, _ in pairs:
            engine.submit(request)
        run(engine, *(heard for _, heard in pairs))
        choices = [heard.choices[0] for _, heard in pairs]
        assert [choice.token_ids for choice in choices] == expected, piece
        scores.append(torch.tensor([each.logprob for choice in choices for each in choice.logprobs]))
    # Attention adds up the same terms in another order.
    torch.testing.assert_close(scores[0], scores[1], atol=2e-4, rtol=0)


def test_an_automatic_route_and_its_decision_do_not_depend_on_pieces() -> None:
    decisions = []
    for piece in (1 << 20, 7):
        model, processor, _ = routed_llava()
        engine = Engine(model, processor, Limits(piece=piece))
        pairs = [
            ask(llava_prompt(processor, QUESTIONS[0] + LONG, 0)),
            ask(llava_prompt(processor, LONG, 1), {}),
            ask(llava_prompt(processor, LONG, 1), {"old": 0.5}),
        ]
        for request, _ in pairs:
            engine.submit(request)
        run(engine, *(heard for _, heard in pairs))
        decisions.append([(heard.started, heard.choices[0].token_ids) for _, heard in pairs])
    assert decisions[0] == decisions[1]


@pytest.mark.parametrize(
    ("prompt", "sizes"),
    [(1, [1]), (96, [96]), (143, [143]), (145, [73, 72]), (300, [100, 100, 100]), (1000, [100] * 10)],
)
def test_pieces_of_a_prompt_are_equal_and_none_is_short(prompt: int, sizes: list[int]) -> None:
    size = piece_tokens(prompt, 96)
    assert [min(size, prompt - begin) for begin in range(0, prompt, size)] == sizes


@given(prompt=st.integers(1, 5000), piece=st.integers(1, 600))
def test_no_piece_is_half_as_large_again(prompt: int, piece: int) -> None:
    assert piece_tokens(prompt, piece) < 1.5 * piece + 1


def test_answers_in_flight_get_a_token_between_pieces() -> None:
    model, processor, _ = routed_llava()
    engine = Engine(model, processor, Limits(piece=16))
    flying, heard = ask(llava_prompt(processor, QUESTIONS[0], 0), max_tokens=200)
    engine.submit(flying)
    while heard.started is None:
        engine.turn()
    long, late = ask(llava_prompt(processor, LONG), max_tokens=4)
    engine.submit(long)
    before = len(heard.choices[0].token_ids)
    turns = 0
    while late.started is None:
        engine.turn()
        turns += 1
    # One turn for the embeddings, then 16 of about 350 tokens a turn.
    assert 15 < turns < 40
    assert len(heard.choices[0].token_ids) == before + turns


def test_a_short_prompt_passes_a_long_one_but_not_for_ever() -> None:
    model, processor, _ = routed_llava()
    engine = Engine(model, processor, Limits(piece=64))
    long, late = ask(llava_prompt(processor, LONG), max_tokens=2)
    engine.submit(long)
    engine.turn()
    engine.turn()
    short, heard = ask(llava_prompt(processor, "How many?"), max_tokens=2)
    engine.submit(short)
    engine.turn()
    assert heard.started is not None and late.started is None
    turns = 0
    while late.started is None:
        engine.submit(ask(llava_prompt(processor, "How many?"), max_tokens=1)[0])
        engine.turn()
        turns += 1
        assert turns < 50, "a long prompt must be read in the end"
    assert turns > PATIENCE


def test_a_cancelled_prompt_is_read_no_further() -> None:
    model, processor, _ = routed_llava()
    engine = Engine(model, processor, Limits(piece=16))
    request, heard = ask(llava_prompt(processor, LONG))
    engine.submit(request)
    for _ in range(3):
        engine.turn()
    assert engine.load == (0, 1)
    request.cancel()
    engine.turn()
    assert engine.load == (0, 0) and heard.started is None


def test_an_unknown_input_is_refused() -> None:
    arguments = {"inputs_embeds": torch.zeros(1, 8, 4), "use_cache": True}
    assert sliced(arguments, 2, 5)["inputs_embeds"].shape == (1, 3, 4)
    with pytest.raises(NotImplementedError, match="known inputs to be read in pieces, got riddle"):
        sliced({**arguments, "riddle": torch.zeros(1)}, 2, 5)
