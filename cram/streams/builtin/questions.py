"""The questions of the long built-in streams: for each layout, the possible questions and their formats.

A question reads its answer off the scene, so it works with every style. A format fixes the last sentence of
the instruction, the scorer and the length of an answer. The wordings are chosen so that each format becomes
one instruction group, with the base's text features and the joining rule of `cram/routing/groups.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cram.streams.builtin.draw import COLORS, SHAPES
from cram.streams.builtin.scenes import Scene, Thing
from cram.streams.builtin.tasks import CORNERS
from cram.streams.made import CAPTION_FORMAT, LETTER_FORMAT, LETTERS, NUMBER_FORMAT, options

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WARM, ROUND = ("red", "yellow", "orange"), ("circle", "heart", "ring")
NUM_CORNERS = {
    "circle": 0, "square": 4, "triangle": 3, "star": 5, "cross": 8, "diamond": 4, "heart": 1, "ring": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Format:
    """The form of an answer: the sentence that asks for it, its scorer and its length limit in tokens."""

    sentence: str
    scorer: str
    max_new_tokens: int


FORMATS: dict[str, Format] = {
    "letter": Format(LETTER_FORMAT, "option_letter", 4),
    "number": Format(NUMBER_FORMAT, "number", 4),
    "caption": Format(CAPTION_FORMAT, "caption", 24),
    "word": Format("In one word, what is it?", "accuracy", 8),
    "check": Format("Choose whether it is true in a word or two.", "accuracy", 4),
    "list": Format("Name them all.", "anls", 16),
}

# (random generator, scene) -> (question, answer).
Ask = Callable[[np.random.Generator, Scene], tuple[str, str]]


@dataclass(frozen=True)
class Question:
    """A question in a format. `ask` draws the wording and reads the answer off the scene."""

    format: str
    ask: Ask


def _choice(question: str, names: list[str], answer: str) -> tuple[str, str]:
    return f"{question} {options(names)}", LETTERS[names.index(answer)]


def _plain(question: str, answer: Callable[[Scene], str]) -> Ask:
    return lambda rng, scene: (question, answer(scene))


def _option(question: str, names: list[str], answer: Callable[[Scene], str]) -> Ask:
    return lambda rng, scene: _choice(question, names, answer(scene))


def _shape(scene: Scene) -> str:
    return scene.things[0].kind


def _color(scene: Scene) -> str:
    return str(scene.things[0].color)


def _lit(scene: Scene) -> int:
    return next(i for i, thing in enumerate(scene.things) if thing.color is not None)


def _lit_place(scene: Scene) -> str:
    return list(CORNERS)[_lit(scene)]


def _tallest(scene: Scene) -> Thing:
    return max(scene.things, key=lambda thing: thing.level)


def _tallest_color(scene: Scene) -> str:
    return str(_tallest(scene).color)


def _colors(scene: Scene) -> str:
    return ", ".join(str(thing.color) for thing in scene.things)


def _size(thing: Thing) -> str:
    return "large" if thing.large else "small"


def _pair_caption(scene: Scene) -> str:
    first, second = (f"a {_size(thing)} {thing.color} {thing.kind}" for thing in scene.things)
    return f"{first} {'above' if scene.vertical else 'left of'} {second}."


def _ask_value(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    levels = [thing.level for thing in scene.things]
    word, value = (("tallest", max(levels)), ("shortest", min(levels)))[int(rng.integers(2))]
    return f"What is the value of the {word} bar?", str(value)


def _ask_change(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    change, by = (("Add", 1), ("Subtract", -1))[int(rng.integers(2))]
    return f"{change} one ball. How many balls are there then?", str(len(scene.things) + by)


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


COLOR_NAMES, SHAPE_NAMES = list(COLORS), list(SHAPES)

# Layout -> name of a question -> the question.
QUESTIONS: dict[str, dict[str, Question]] = {
    "single": {
        "shape": Question("letter", _option("Which shape is drawn?", SHAPE_NAMES, _shape)),
        "name": Question("word", _plain("What is the shape?", _shape)),
        "color": Question("word", _plain("What color is the shape?", _color)),
        "corners": Question(
            "number", _plain("How many corners are there?", lambda s: str(NUM_CORNERS[_shape(s)]))
        ),
        "round": Question("check", _plain("Is the shape round?", lambda s: _yes(_shape(s) in ROUND))),
        "warm": Question("check", _plain("Is the color warm?", lambda s: _yes(_color(s) in WARM))),
    },
    "pair": {
        "caption": Question("caption", _plain("", _pair_caption)),
        "colors": Question("list", _plain("Which colors are there?", _colors)),
        "sizes": Question(
            "letter",
            _option(
                "Which of the two is large?",
                ["first", "second", "both", "none"],
                lambda s: {(1, 0): "first", (0, 1): "second", (1, 1): "both", (0, 0): "none"}[
                    s.things[0].large, s.things[1].large
                ],
            ),
        ),
        "above": Question("check", _plain("Are they above each other?", lambda s: _yes(s.vertical))),
    },
    "corners": {
        "place": Question("letter", _option("Which icon is lit?", list(CORNERS), _lit_place)),
        "color": Question("word", _plain("What color is the icon?", lambda s: str(s.things[_lit(s)].color))),
        "top": Question("check", _plain("Is the icon at the top lit?", lambda s: _yes(_lit(s) < 2))),
        "caption": Question(
            "caption",
            _plain("", lambda s: f"a {s.things[_lit(s)].color} icon is lit at the {_lit_place(s)}."),
        ),
    },
    "crowd": {
        "count": Question("number", _plain("How many balls are there?", lambda s: str(len(s.things)))),
        "change": Question("number", _ask_change),
        "many": Question(
            "letter",
            _option("How many balls are there?", list("12345"), lambda s: str(len(s.things))),
        ),
        "more": Question(
            "check", _plain("Is the number of balls more than 2?", lambda s: _yes(len(s.things) > 2))
        ),
    },
    "bars": {
        "value": Question("number", _ask_value),
        "count": Question("number", _plain("How many bars are there?", lambda s: str(len(s.things)))),
        "tallest": Question("word", _plain("What color is the tallest bar?", _tallest_color)),
        "option": Question("letter", _option("Which bar is the tallest?", COLOR_NAMES, _tallest_color)),
        "warm": Question(
            "check",
            _plain("Is the tallest bar warm?", lambda s: _yes(_tallest_color(s) in WARM)),
        ),
        "colors": Question("list", _plain("Which colors are the bars?", _colors)),
        "caption": Question(
            "caption",
            _plain("", lambda s: f"a chart of {len(s.things)} bars, the tallest bar is {_tallest_color(s)}."),
        ),
    },
    "digit": {
        "read": Question("number", _plain("Which number is written?", lambda s: str(s.things[0].level))),
        "next": Question(
            "number", _plain("Add one. Which number is it then?", lambda s: str(s.things[0].level + 1))
        ),
        "spell": Question(
            "word", _plain("What number is written?", lambda s: DIGIT_WORDS[s.things[0].level])
        ),
        "even": Question(
            "check",
            _plain("Is the number even?", lambda s: _yes(s.things[0].level % 2 == 0)),
        ),
    },
}
