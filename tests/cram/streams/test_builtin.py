"""The built-in stream: decided by its seed, disjoint splits, answers in the form that each task asks for."""

from __future__ import annotations

import re

import numpy as np
import pytest

from cram.scoring import score
from cram.streams import load_stream
from cram.streams.builtin import STREAMS, build
from cram.streams.builtin.tasks import TASKS, _handwriting
from cram.streams.types import Sample, Stream

ANSWERS = {
    "sketches": r"[A-H]",
    "charts": r"[1-6]",
    "captions": r"a (small|large) \w+ \w+ (above|left of) a (small|large) \w+ \w+\.",
    "icons": r"[ABCD]",
    "arithmetic": r"[0-6]",
    "digits": r"\d",
}


@pytest.fixture(scope="module")
def stream() -> Stream:
    return build(seed=3, train_samples=64, test_samples=40)


def pictures(samples: tuple[Sample, ...]) -> list[tuple[bytes, str]]:
    return [(sample.images[0].tobytes(), sample.instruction) for sample in samples]


def test_a_seed_decides_the_stream(stream: Stream) -> None:
    again, other = build(3, 64, 40), build(4, 64, 40)
    for task, same, different in zip(stream.tasks, again.tasks, other.tasks, strict=True):
        assert pictures(task.train) == pictures(same.train) and pictures(task.test) == pictures(same.test)
        assert [s.answer for s in task.test] == [s.answer for s in same.test]
        assert pictures(task.train) != pictures(different.train)


def test_splits_share_no_question(stream: Stream) -> None:
    for task in stream.tasks:
        train, test = pictures(task.train), pictures(task.test)
        assert not set(train) & set(test)
        assert len(set(train)) == len(train) and len(set(test)) == len(test)


def test_handwriting_splits_share_no_scan() -> None:
    train, test = (_handwriting(split)[0] for split in ("train", "test"))
    assert len(train) + len(test) == 1797
    assert not {scan.tobytes() for scan in train} & {scan.tobytes() for scan in test}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_have_their_form_and_score_full(stream: Stream, name: str) -> None:
    task = next(task for task in stream.tasks if task.name == name)
    assert all(re.fullmatch(ANSWERS[name], sample.answer) for sample in (*task.train, *task.test))
    assert score(task.scorer, {s.id: s.answer for s in task.test}, task.test) > 99.9
    assert len({sample.answer for sample in task.train}) > 3


def test_sizes_and_order() -> None:
    assert STREAMS["builtin"].test_samples >= 256
    names = [task.name for task in load_stream("builtin", seed=0, limit=8).tasks]
    assert names == list(ANSWERS) == [task.name for task in TASKS]


def test_option_letters_are_balanced() -> None:
    rng = np.random.default_rng(0)
    for task in TASKS:
        if task.scorer == "option_letter":
            letters = [task.draw(rng, "train")[2] for _ in range(400)]
            fair = 400 / len(set(letters))
            assert all(0.6 * fair < letters.count(letter) < 1.4 * fair for letter in set(letters))


@pytest.mark.parametrize("sizes", [(0, 8), (8, 0), (-1, 8)])
def test_sizes_must_be_positive(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must be positive, got"):
        build(0, *sizes)


def test_an_unknown_stream_is_refused() -> None:
    with pytest.raises(ValueError, match="name must be one of .* got 'builtin-30'"):
        build(0, 4, 4, "builtin-30")
