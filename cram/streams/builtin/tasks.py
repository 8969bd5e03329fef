"""The six built-in tasks. Each has its own kind of picture, its own question and its own form of answer.

In the spirit of UCIT: classification of sketches with option letters, chart reading, captioning, icon
questions, counting arithmetic on rendered scenes, and handwritten digits. A sample depends only on the random
generator, so a seed decides the whole stream.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image

from cram.streams.builtin.draw import (
    COLORS,
    SHAPES,
    SIZE,
    Canvas,
    gradient_background,
    jitter_color,
    noise_background,
    outline,
)
from cram.streams.made import (
    CAPTION_FORMAT,
    LETTER_FORMAT,
    LETTERS,
    NUMBER_FORMAT,
    BuiltinTask,
    Drawn,
    options,
)

CORNERS: dict[str, tuple[int, int]] = {
    "top left": (13, 13),
    "top right": (35, 13),
    "bottom left": (13, 35),
    "bottom right": (35, 35),
}


def _choose(rng: np.random.Generator, names: list[str], count: int) -> list[str]:
    return [names[i] for i in rng.permutation(len(names))[:count]]


def draw_sketch(rng: np.random.Generator, split: str) -> Drawn:
    """A shape in wobbly pencil lines on paper; which of eight names is it?"""
    del split
    names = list(SHAPES)
    answer = int(rng.integers(len(names)))
    paper = noise_background(rng, (222, 212, 190), 14, 12)
    canvas = Canvas(paper)
    x, y = rng.uniform(20, 28, size=2)
    radius, turn = rng.uniform(13, 18), rng.uniform(-0.25, 0.25)
    ink = (60 + int(rng.integers(30)),) * 3
    for _ in range(2):
        corners = outline(names[answer], x, y, radius, turn)
        wobbly = [(px + rng.normal(0, 0.45), py + rng.normal(0, 0.45)) for px, py in corners]
        canvas.line([*wobbly, wobbly[0]], ink, 1.0)
    if names[answer] == "ring":
        inner = outline("circle", x, y, radius * 0.55, turn)
        canvas.line([*inner, inner[0]], ink, 1.2)
    return canvas.finish(), f"Which shape is drawn? {options(names)} {LETTER_FORMAT}", LETTERS[answer]


def draw_chart(rng: np.random.Generator, split: str) -> Drawn:
    """A bar chart on white with axes and grid; what is the value of its tallest or shortest bar?"""
    del split
    count = int(rng.integers(3, 5))
    names = _choose(rng, list(COLORS), count)
    values = [int(value) for value in rng.permutation(6)[:count] + 1]
    canvas = Canvas((250, 250, 250))
    for level in range(1, 7):
        canvas.line([(7, 43 - 6 * level), (46, 43 - 6 * level)], (214, 214, 214), 0.5)
    step = 38 / count
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        left = 8 + i * step + 1.5
        canvas.rectangle((left, 43 - 6 * value, left + step - 3, 43), jitter_color(rng, COLORS[name]))
    canvas.line([(7, 5), (7, 43), (46, 43)], (40, 40, 40), 1.0)
    word, value = (("tallest", max(values)), ("shortest", min(values)))[int(rng.integers(2))]
    return canvas.finish(), f"What is the value of the {word} bar? {NUMBER_FORMAT}", str(value)


def draw_photo(rng: np.random.Generator, split: str) -> Drawn:
    """Two objects of two sizes before a sky; a caption that names both and how they lie to each other."""
    del split
    sky = np.array([150, 190, 235]) + rng.integers(-20, 20, size=3)
    ground = np.array([90, 150, 80]) + rng.integers(-20, 20, size=3)
    canvas = Canvas(gradient_background(tuple(sky), tuple(ground)))
    vertical = bool(rng.integers(2))
    names = _choose(rng, list(SHAPES), 2)
    phrases = []
    for i, name in enumerate(names):
        along, across = (13 if i == 0 else 35) + rng.uniform(-2, 2), 24 + rng.uniform(-4, 4)
        x, y = (across, along) if vertical else (along, across)
        large = bool(rng.integers(2))
        color = list(COLORS)[int(rng.integers(len(COLORS)))]
        canvas.shape(
            name, x, y, 10.0 if large else 5.5, jitter_color(rng, COLORS[color]), rng.uniform(-0.2, 0.2)
        )
        phrases.append(f"a {'large' if large else 'small'} {color} {name}")
    relation = "above" if vertical else "left of"
    return canvas.finish(), CAPTION_FORMAT, f"{phrases[0]} {relation} {phrases[1]}."


def draw_icons(rng: np.random.Generator, split: str) -> Drawn:
    """Four icons on dark tiles, one of them lit up; in which tile is it?"""
    del split
    names = _choose(rng, list(SHAPES), 4)
    canvas = Canvas((235, 235, 240))
    tile = (34, 52 + int(rng.integers(-8, 8)), 74 + int(rng.integers(-10, 10)))
    lit = int(rng.integers(4))
    color = COLORS[_choose(rng, list(COLORS), 1)[0]]
    for i, ((x, y), name) in enumerate(zip(CORNERS.values(), names, strict=True)):
        canvas.rectangle((x - 10, y - 10, x + 10, y + 10), tile)
        fill = jitter_color(rng, color) if i == lit else (110, 118, 128)
        canvas.shape(name, x, y, rng.uniform(6.5, 8.0), fill)
    question = f"Which icon is lit? {options(list(CORNERS))} {LETTER_FORMAT}"
    return canvas.finish(), question, LETTERS[lit]


def draw_scene(rng: np.random.Generator, split: str) -> Drawn:
    """Shaded balls on a lit floor; how many are there after one is added or taken away?"""
    del split
    canvas = Canvas(gradient_background((70, 70, 78), (128, 124, 118)))
    count = int(rng.integers(1, 6))
    colors = list(COLORS)
    for cell in rng.permutation(6)[:count]:
        x, y = 9 + 15 * (cell % 3) + rng.uniform(-1.5, 1.5), 14 + 20 * (cell // 3) + rng.uniform(-2, 2)
        color = COLORS[colors[int(rng.integers(len(colors)))]]
        _draw_ball(canvas, x, y, 6.0, jitter_color(rng, color, 8))
    change, result = (("Add", count + 1), ("Subtract", count - 1))[int(rng.integers(2))]
    question = f"{change} one ball. How many balls are there then?"
    return canvas.finish(), f"{question} {NUMBER_FORMAT}", str(result)


def _draw_ball(canvas: Canvas, x: float, y: float, radius: float, color: tuple[int, int, int]) -> None:
    canvas.disc(x + 1.2, y + 1.8, radius, (50, 48, 46))
    for shade, size, shift in ((0.75, 1.0, 0.0), (1.0, 0.8, 0.9), (1.35, 0.35, 2.0)):
        tone = tuple(min(255, int(channel * shade)) for channel in color)
        canvas.disc(x - shift, y - shift, radius * size, (tone[0], tone[1], tone[2]))


def draw_digits(rng: np.random.Generator, split: str) -> Drawn:
    """A digit written by hand (scikit-learn's scans; each split has its own scans); which one is it?"""
    scans, labels = _handwriting(split)
    index = int(rng.integers(len(labels)))
    canvas = Image.new("L", (SIZE, SIZE), 0)
    width, height = int(rng.integers(24, 32)), int(rng.integers(32, 40))
    scan = Image.fromarray(scans[index]).resize((width, height), Image.Resampling.BICUBIC)
    left, top = (
        (SIZE - width) // 2 + int(rng.integers(-4, 5)),
        (SIZE - height) // 2 + int(rng.integers(-3, 4)),
    )
    canvas.paste(scan, (left, top))
    question = f"Which number is written by hand? {NUMBER_FORMAT}"
    return canvas.convert("RGB"), question, str(labels[index])


@lru_cache(maxsize=2)
def _handwriting(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The scans of one split [N, 8, 8] uint8 with their labels [N]; every fourth scan is a test scan."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    is_test = np.arange(len(digits.target)) % 4 == 0
    chosen = is_test if split == "test" else ~is_test
    return (digits.images[chosen] * (255 / 16)).astype(np.uint8), digits.target[chosen]


TASKS: tuple[BuiltinTask, ...] = (
    BuiltinTask(0, "sketches", draw_sketch, "option_letter", 4),
    BuiltinTask(1, "charts", draw_chart, "number", 4),
    BuiltinTask(2, "captions", draw_photo, "caption", 20),
    BuiltinTask(3, "icons", draw_icons, "option_letter", 4),
    BuiltinTask(4, "arithmetic", draw_scene, "number", 4),
    BuiltinTask(5, "digits", draw_digits, "number", 4),
)
