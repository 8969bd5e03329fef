"""What all tasks with pictures made on the spot have in common: their type and the forms of their answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

Drawn = tuple[Image.Image, str, str]
Generator = Callable[[np.random.Generator, str], Drawn]

LETTERS = "ABCDEFGH"
LETTER_FORMAT = "Answer with the option's letter from the given choices directly."
NUMBER_FORMAT = "The answer must be a single number."
CAPTION_FORMAT = "Write a short caption."


@dataclass(frozen=True)
class BuiltinTask:
    """A task's generator with its scoring rule and answer length in tokens.

    Attributes:
        key: Decides the task's pictures, together with the stream's seed. Every task has another key.
    """

    key: int
    name: str
    draw: Generator
    scorer: str
    max_new_tokens: int


def options(names: list[str]) -> str:
    """`A. first B. second ...`"""
    return " ".join(f"{letter}. {name}" for letter, name in zip(LETTERS, names, strict=False))
