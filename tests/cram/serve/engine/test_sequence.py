"""Text from tokens, piece by piece, and where an answer ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch

from cram.serve.engine.sequence import Answer, StopFilter, TextStream
from cram.serve.request import Prompt, Request, Sampling
from tests.cram.factories import SPECIAL, tokenizer

TEXTS = ["plain words", "größer – 大きい 🙂🙃", " leading", "", "a  b\n\n c "]
END = SPECIAL["</s>"]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_add_up_to_the_text_and_are_never_half_characters(text: str) -> None:
    words = tokenizer()
    stream = TextStream(words)
    pieces = [stream.add(token) for token in words(text, add_special_tokens=False)["input_ids"]]
    assert not any("�" in piece for piece in pieces)
    assert "".join([*pieces, stream.close()]) == text


def test_an_unfinished_character_is_given_out_at_the_end() -> None:
    words = tokenizer()
    ids = words("🙂", add_special_tokens=False)["input_ids"][:-1]
    stream = TextStream(words)
    assert [stream.add(token) for token in ids] == [""] * len(ids)
    assert "�" in stream.close()


def splits(text: str) -> Iterator[list[str]]:
    """Every way to cut a short text into pieces."""
    for cuts in range(2 ** (len(text) - 1)):
        pieces = [text[0]]
        for place, letter in enumerate(text[1:]):
            if cuts >> place & 1:
                pieces.append(letter)
            else:
                pieces[-1] += letter
        yield pieces


@pytest.mark.parametrize(
    ("text", "stops", "kept"),
    [
        ("abcabd", ("abd",), "abc"),
        ("aabaac", ("aac", "x"), "aab"),
        ("abcde", ("cd", "b"), "a"),
        ("abab", ("abc",), "abab"),
        ("xyz", (), "xyz"),
    ],
)
def test_a_stop_string_is_found_however_the_text_is_cut(text: str, stops: Sequence[str], kept: str) -> None:
    for pieces in splits(text):
        stop = StopFilter(stops)
        out = ""
        for piece in pieces:
            out += stop.add(piece)
            if stop.found:
                break
        else:
            out += stop.close()
        assert out == kept, pieces


def answered(ids: Sequence[int], limit: int = 100, **sampling: object) -> tuple[str, str | None, int]:
    """The text of an answer with these tokens, why it ends, and how many tokens it took."""
    request = Request(Prompt(dict), lambda event: None, Sampling(**sampling))  # type: ignore[arg-type]
    answer = Answer(request, 0, tokenizer(), [END], limit, 0)
    text, finish = "", None
    for token in ids:
        delta = answer.take(token, torch.zeros(320))
        text, finish = text + delta.text, delta.finish
        if finish:
            break
    return text, finish, len(answer.token_ids)


def test_answers_end_at_the_end_token_a_stop_string_or_the_limit() -> None:
    ids = tokenizer()(" one two three", add_special_tokens=False)["input_ids"]
    assert answered([*ids, END, *ids]) == ("one two three", "stop", len(ids) + 1)
    assert answered(ids, limit=6) == ("one t", "length", 6)
    assert answered(ids, stop=("two",)) == ("one ", "stop", 8)
    assert answered(ids, stop=("ee!", "tw!")) == ("one two thr", None, len(ids))
    assert answered([*ids, END], stop=("ee!",)) == ("one two three", "stop", len(ids) + 1)
    assert answered(ids, limit=10, stop=("o t",)) == ("one tw", "stop", 10)


@pytest.mark.parametrize("temperature", [1e-3, 1e-100, 5e-324])
def test_a_temperature_near_0_takes_the_best_token(temperature: float) -> None:
    request = Request(Prompt(dict), lambda event: None, Sampling(temperature=temperature, seed=0))
    scores = torch.linspace(-30, 30, 320)[torch.randperm(320, generator=torch.Generator().manual_seed(0))]
    assert Answer(request, 0, tokenizer(), [END], 9, 0).choose(scores, 0) == int(scores.argmax())
