"""Answer formats in many wordings, for the language model's instructions and for the text tower.

A format's sentences are all pairs of a verb and an object, and a few whole sentences. The text tower learns
to tell formats apart on these. `HELD_OUT` has other sentences, which no training sees; the acceptance test
groups by them.
"""

from __future__ import annotations

from functools import cache

import numpy as np

VERBS = (
    "Answer with", "Give", "Reply with", "Respond with", "Return", "Output", "Write down", "Provide",
    "Answer the question with", "The answer must be", "The reply should be", "Use", "State",
)  # fmt: skip
OBJECTS: dict[str, tuple[str, ...]] = {
    "letter": (
        "the letter of the right option",
        "the letter of the correct choice",
        "the option letter only",
        "one letter of the options",
        "a single letter",
        "the letter before the right name",
        "the letter of your choice",
    ),
    "number": (
        "a number",
        "one number only",
        "the number in digits",
        "digits only",
        "a single whole number",
        "the value as a number",
        "just the number",
    ),
    "caption": (
        "a caption for the picture",
        "a sentence about the picture",
        "a brief description of the image",
        "one sentence that says what is shown",
        "a short description",
        "a caption in one sentence",
        "a short sentence about the image",
    ),
    "word": (
        "one word",
        "just one word",
        "the word alone",
        "one word or name",
        "one word and nothing else",
        "a word or a short phrase",
        "only a word",
    ),
    "yesno": (
        "yes or no",
        "just yes or no",
        "either yes or no",
        "only yes or no",
        "yes if it is true and no otherwise",
    ),
}  # fmt: skip
WHOLE: dict[str, tuple[str, ...]] = {
    "letter": (
        "Choose one option by its letter.",
        "Which option is right? Name its letter.",
        "Is it A, B, C or D?",
        "Say A, B, C or D.",
        "A, B, C or D?",
    ),
    "number": (
        "Say the number.",
        "Use digits for the answer.",
        "A numeral is the answer.",
        "How much is it, in numerals?",
    ),
    "caption": (
        "Describe the picture briefly.",
        "Caption the image.",
        "Tell in one sentence what is there.",
        "What would you write below the picture?",
    ),
    "word": ("Say it in one word.", "A word will do.", "Keep it to one word.", "Which word is it?"),
    "yesno": ("Is it true? Yes or no.", "Say yes or no.", "Yes? Or no?"),
}
HELD_OUT: dict[str, tuple[str, ...]] = {
    "letter": (
        "Answer with the option's letter from the given choices directly.",
        "Select the matching option and state its letter.",
        "Pick A, B, C or D.",
        "Mark the right choice with its letter.",
        "Your answer is one of the letters.",
    ),
    "number": (
        "The answer must be a single number.",
        "Answer the question with one numeral.",
        "Only a number is wanted.",
        "Let me have a number.",
        "Put your answer into figures: one number.",
    ),
    "caption": (
        "Write a short caption.",
        "Sum up the image in a sentence.",
        "Say in one short sentence what can be seen.",
        "Put the image into a sentence.",
        "One line of description, please.",
    ),
    "word": (
        "Answer with one word.",
        "Answer the question using a single word.",
        "One word is enough.",
        "In one word, please.",
        "Choose one word for it.",
    ),
    "yesno": (
        "Answer yes or answer no.",
        "Confirm it with yes or deny it with no.",
        "Decide between yes and no.",
        "Respond by yes or by no.",
        "Just say whether yes or no.",
    ),
}
FORMATS = tuple(OBJECTS)
LETTERS = "ABCDEFGH"


@cache
def sentences(form: str) -> list[str]:
    """Every training sentence of a format: none is held out."""
    made = [f"{verb} {end}." for verb in VERBS for end in OBJECTS[form]]
    return [each for each in (*made, *WHOLE[form]) if each not in HELD_OUT[form]]


def draw_sentence(rng: np.random.Generator, form: str) -> str:
    """One training sentence of a format: in one of five draws a whole one, else a verb with an object."""
    known = WHOLE[form] if rng.random() < 0.2 else sentences(form)
    return known[int(rng.integers(len(known)))]


def list_options(names: list[str]) -> str:
    """`A. fox B. owl ...`"""
    return " ".join(f"{letter}. {name}" for letter, name in zip(LETTERS, names, strict=False))


def instruction(rng: np.random.Generator, question: str, names: list[str] | None, form: str) -> str:
    """A question, its options and a sentence for its format: mostly behind the question, else before it.

    Half of the questions about colours are spelt the British way.
    """
    asked = " ".join(part for part in (question, list_options(names or [])) if part)
    if rng.random() < 0.5:
        asked = asked.replace("color", "colour")
    sentence = draw_sentence(rng, form)
    return f"{sentence} {asked}".strip() if rng.random() < 0.15 else f"{asked} {sentence}".strip()
