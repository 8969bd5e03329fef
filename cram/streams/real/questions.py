"""The wordings of the ten tasks, and the sentences that ask for a format.

Tasks of one format end in the same sentence. Each sample draws one of its task's wordings.
"""

from __future__ import annotations

import numpy as np

from cram.streams.made import CAPTION_FORMAT, LETTER_FORMAT, LETTERS, NUMBER_FORMAT, options

WORD_FORMAT = "Answer with one word."

# Format -> (sentence, scorer, length of an answer in tokens at most).
FORMATS: dict[str, tuple[str, str, int]] = {
    "letter": (LETTER_FORMAT, "option_letter", 4),
    "number": (NUMBER_FORMAT, "number", 6),
    "caption": (CAPTION_FORMAT, "caption", 32),
    "word": (WORD_FORMAT, "accuracy", 8),
}

WORDINGS: dict[str, tuple[str, ...]] = {
    "animal-pick": (
        "Which animal is this?",
        "Which animal is on the card?",
        "What animal does the picture show?",
        "Name the animal.",
    ),
    "digit-read": (
        "Which number is written here?",
        "Read the number.",
        "What number do you see?",
        "Which number was written by hand?",
    ),
    "flag-pick": (
        "Which country has this flag?",
        "Whose flag is this?",
        "Which country does the flag belong to?",
        "Name the country of the flag.",
    ),
    "food-count": (
        "How many pieces of food are there?",
        "Count the food.",
        "How many things to eat do you see?",
        "How many pieces of food lie here?",
    ),
    "animal-caption": (
        "What does the card show?",
        "Describe the animal and its place.",
        "What is to be seen?",
        "Describe the picture.",
    ),
    "surface-word": (
        "What is this a photo of?",
        "What does the photo show?",
        "Which surface is this?",
        "What do you see in the photo?",
    ),
    "flag-colour": (
        "Which colour is {region}?",
        "What colour do you see {region}?",
        "Name the colour {region}.",
    ),
    "digit-pick": (
        "Which number is written here?",
        "Read the number.",
        "What number do you see?",
        "Which number was written by hand?",
    ),
    "chart-value": (
        "The bars show {title}. What is the value of the marked bar?",
        "How high is the coloured bar? The bars show {title}.",
        "The bars show {title}. Read the value of the coloured bar.",
    ),
}

_UNITS = "zero one two three four five six seven eight nine".split()  # noqa: SIM905
_TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()  # noqa: SIM905
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()  # noqa: SIM905


def number_words(number: int) -> str:
    """A number from 0 to 99 in words, such as "forty-two"."""
    tens, unit = divmod(number, 10)
    if tens < 2:
        return _TEENS[unit] if tens else _UNITS[unit]
    return _TENS[tens - 2] + (f"-{_UNITS[unit]}" if unit else "")


def ask(rng: np.random.Generator, wordings: str, form: str, **parts: str) -> str:
    """An instruction: a wording of `WORDINGS` and the sentence of a format."""
    texts = WORDINGS[wordings]
    return f"{texts[int(rng.integers(len(texts)))].format(**parts)} {FORMATS[form][0]}"


def ask_options(rng: np.random.Generator, wordings: str, answer: str, others: list[str]) -> tuple[str, str]:
    """An instruction with lettered options in random order, and the letter of the answer."""
    names = [answer, *others]
    names = [names[i] for i in rng.permutation(len(names))]
    texts = WORDINGS[wordings]
    text = texts[int(rng.integers(len(texts)))]
    return f"{text} {options(names)} {LETTER_FORMAT}", LETTERS[names.index(answer)]
