"""The pretraining mixture of the built-in base: general skills with images and text.

The pictures are plain scenes of coloured shapes, gauges, groups of bars and printed digits. The skills are
naming, colour, place, size, counting, comparing, reading, a letter code of colours, and copying of text. No
skill is a task of the built-in stream. The stream asks for combinations of the skills, on other kinds of
pictures and in other forms of answer, as a real stream does with a real base.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

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

WORDS = (
    "a", "the", "is", "are", "of", "in", "on", "and", "what", "which", "where", "how", "many",
    "number", "letter", "word", "shape", "drawn", "icon", "bar", "ball", "balls", "value", "left",
    "right", "above", "below", "top", "bottom", "center", "small", "large", "option", "option's",
    "choices", "answer", "single", "sentence", "caption", "image", "provided", "given", "question",
    "using", "from", "directly", "write", "written", "by", "hand", "all", "subtract",
    "one-sentence", "for", "with", "there", "no", "yes", "Which", "What", "Where", "How",
    "Subtract", "Write", "Answer", "Pick",
)  # fmt: skip
LETTERS = "ABCDEFGH"
NUMBERS = [str(i) for i in range(10)]
CELLS = {
    "top left": (13, 13), "top": (24, 12), "top right": (35, 13), "left": (12, 24), "center": (24, 24),
    "right": (36, 24), "bottom left": (13, 35), "bottom": (24, 36), "bottom right": (35, 35),
}  # fmt: skip
CORNERS = ("top left", "top right", "bottom left", "bottom right")


MARKS = (*SHAPES, *(f"digit {i}" for i in range(10)), "bar")
LEVELS = 8


@dataclass(frozen=True)
class Mark:
    """The mark at a point of a picture: a kind of `MARKS`, a colour or None, and a level for bars."""

    x: float
    y: float
    kind: str
    color: str | None
    level: int | None = None


@dataclass(frozen=True)
class Example:
    """One pretraining example; `family` names the kind of picture (None: text only)."""

    image: Image.Image | None
    question: str
    answer: str
    family: str | None
    caption: str = ""
    marks: tuple[Mark, ...] = ()


@dataclass
class Thing:
    """A drawn object."""

    shape: str
    color: str
    place: str
    large: bool
    x: float = 0.0
    y: float = 0.0

    @property
    def mark(self) -> Mark:
        """The object's mark in the picture."""
        return Mark(self.x, self.y, self.shape, self.color)

    @property
    def name(self) -> str:
        """Colour and shape."""
        return f"{self.color} {self.shape}"


@dataclass
class Scene:
    """A picture of a few objects in reading order."""

    things: list[Thing] = field(default_factory=list)
    image: Image.Image | None = None

    @property
    def caption(self) -> str:
        """The objects in reading order."""
        return ", ".join(thing.name for thing in self.things)


def _pick(rng: np.random.Generator, names: list[str] | tuple[str, ...]) -> str:
    return names[int(rng.integers(len(names)))]


def _some(rng: np.random.Generator, names: list[str] | tuple[str, ...], count: int) -> list[str]:
    return [names[i] for i in rng.permutation(len(names))[:count]]


def _background(rng: np.random.Generator) -> np.ndarray:
    """A ground of random brightness and tint: textured, or fading from top to bottom."""
    level = int(rng.integers(0, 90)) if rng.random() < 0.5 else int(rng.integers(165, 256))
    tint = np.clip(level + rng.integers(-30, 31, size=3), 0, 255)
    if rng.random() < 0.3:
        other = np.clip(tint + rng.integers(-70, 71), 0, 255)
        return gradient_background(_rgb(tint), _rgb(other))
    return noise_background(rng, _rgb(tint), int(rng.choice([1, 6, 14])), int(rng.choice([8, 12])))


def _rgb(values: np.ndarray) -> tuple[int, int, int]:
    return int(values[0]), int(values[1]), int(values[2])


def style_words(image: Image.Image) -> str:
    """Words for the look of a picture's border: its brightness, tint, fading and roughness."""
    pixels = np.asarray(image, np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    mean = border.mean(0)
    words = [("black", "dark", "grey", "light", "white")[min(4, int(mean.mean() / 51))]]
    if mean.max() - mean.min() > 24:
        words.append(("reddish", "greenish", "bluish")[int(mean.argmax())])
    if abs(pixels[0].mean() - pixels[-1].mean()) > 20:
        words.append("fading")
    if pixels[0].std(0).mean() > 4:
        words.append("rough")
    return " ".join(words)


def draw_scene(rng: np.random.Generator, low: int, high: int, *, corners: bool = False) -> Scene:
    """`low`..`high` different shapes, each in a place of its own."""
    count = int(rng.integers(low, high + 1))
    names = CORNERS if corners else tuple(CELLS)
    places = sorted(_some(rng, names, count), key=list(CELLS).index)
    kinds = _some(rng, tuple(SHAPES), count)
    scene, canvas = Scene(), Canvas(_background(rng))
    crowded = count > 4 or not corners
    for place, shape in zip(places, kinds, strict=True):
        thing = Thing(shape, _pick(rng, tuple(COLORS)), place, bool(rng.integers(2)))
        x, y = CELLS[place]
        radius = (8.0 if crowded else 10.0) if thing.large else (5.0 if crowded else 5.5)
        _draw_thing(rng, canvas, thing, x + rng.uniform(-2, 2), y + rng.uniform(-2, 2), radius)
        scene.things.append(thing)
    scene.image = canvas.finish()
    return scene


def _draw_thing(
    rng: np.random.Generator, canvas: Canvas, thing: Thing, x: float, y: float, radius: float
) -> None:
    thing.x, thing.y = x, y
    color, turn = jitter_color(rng, COLORS[thing.color]), rng.uniform(-0.3, 0.3)
    if rng.random() < 0.3:
        corners = outline(thing.shape, x, y, radius, turn)
        canvas.line([*corners, corners[0]], color, rng.uniform(0.8, 1.8))
        if thing.shape == "ring":
            canvas.line(outline("circle", x, y, radius * 0.55), color, 1.0)
    else:
        canvas.shape(thing.shape, x, y, radius, color, turn)


def describe_long(rng: np.random.Generator) -> Example:
    """One or two objects with their sizes in a sentence."""
    scene = draw_scene(rng, 1, 2, corners=True)
    names = [f"a {'large' if t.large else 'small'} {t.name}" for t in scene.things]
    return _about(scene, "Describe the picture.", f"there is {' and '.join(names)}.")


def name_shape(rng: np.random.Generator) -> Example:
    """The shape of the only object, drawn in any size."""
    thing = Thing(_pick(rng, tuple(SHAPES)), _pick(rng, tuple(COLORS)), "center", True)
    canvas = Canvas(_background(rng))
    x, y = rng.uniform(18, 30, size=2)
    if rng.random() < 0.4:
        grey = 240 if canvas.dark else 40
        canvas.shape(thing.shape, x, y, rng.uniform(5, 17), (grey, grey, grey), rng.uniform(-0.3, 0.3))
        marks = (Mark(x, y, thing.shape, None),)
        return Example(
            canvas.finish(), "Name the object.", thing.shape, "scene", f"plain {thing.shape}", marks
        )
    _draw_thing(rng, canvas, thing, x, y, rng.uniform(5, 17))
    return _about(Scene([thing], canvas.finish()), "Name the object.", thing.shape)


def color_word(rng: np.random.Generator) -> Example:
    """The colour of one object."""
    scene = draw_scene(rng, 1, 4)
    thing = scene.things[int(rng.integers(len(scene.things)))]
    return _about(scene, f"What color is the {thing.shape}?", thing.color)


def color_code(rng: np.random.Generator) -> Example:
    """The letter that stands for the colour of one object. The code never changes."""
    scene = draw_scene(rng, 1, 3)
    thing = scene.things[int(rng.integers(len(scene.things)))]
    code = " ".join(f"{letter} {name}" for letter, name in zip(LETTERS, COLORS, strict=False))
    return _about(
        scene,
        f"Code: {code} G none H other. Color code of the {thing.shape}:",
        LETTERS[list(COLORS).index(thing.color)],
    )


def place(rng: np.random.Generator) -> Example:
    """Where one object lies."""
    scene = draw_scene(rng, 1, 4, corners=bool(rng.integers(2)))
    thing = scene.things[int(rng.integers(len(scene.things)))]
    return _about(scene, f"Locate the {thing.shape}.", thing.place)


def count(rng: np.random.Generator) -> Example:
    """How many objects there are: all, of one colour, or of one shape."""
    number = int(rng.integers(1, 8))
    colors, shapes = _some(rng, tuple(COLORS), 2), _some(rng, tuple(SHAPES), 2)
    canvas, things = Canvas(_background(rng)), []
    for cell in _some(rng, tuple(CELLS), number):
        thing = Thing(_pick(rng, shapes), _pick(rng, colors), cell, True)
        x, y = CELLS[cell]
        _draw_thing(rng, canvas, thing, x + rng.uniform(-1, 1), y + rng.uniform(-1, 1), rng.uniform(4.5, 6.5))
        things.append(thing)
    what = int(rng.integers(3))
    asked, matching = (
        ("Count the objects.", things),
        (f"Count the {colors[0]} objects.", [t for t in things if t.color == colors[0]]),
        (f"Count the {shapes[0]} shapes.", [t for t in things if t.shape == shapes[0]]),
    )[what]
    caption = ", ".join(t.name for t in things)
    marks = tuple(t.mark for t in things)
    return Example(canvas.finish(), asked, str(len(matching)), "scene", caption, marks)


def gauge(rng: np.random.Generator) -> Example:
    """The level of a single upright gauge with ticks."""
    level, color = int(rng.integers(0, 8)), _pick(rng, tuple(COLORS))
    canvas = Canvas(_background(rng))
    left, width = rng.uniform(6, 34), rng.uniform(5, 11)
    for tick in range(8):
        canvas.line([(left - 3, 44 - 5.6 * tick), (left, 44 - 5.6 * tick)], (128, 128, 128), 0.6)
    canvas.rectangle((left, 44 - 5.6 * level, left + width, 45), jitter_color(rng, COLORS[color]))
    marks = (Mark(left + width / 2, 44, "bar", color, level),)
    return Example(
        canvas.finish(), "Read the gauge.", str(level), "gauge", f"{color} gauge at {level}", marks
    )


def _bars(rng: np.random.Generator) -> tuple[list[str], list[int], Image.Image, tuple[Mark, ...]]:
    names = _some(rng, tuple(COLORS), int(rng.integers(2, 5)))
    heights = [int(h) for h in rng.permutation(7)[: len(names)] + 1]
    canvas = Canvas(_background(rng))
    step, marks = 42 / len(names), []
    for i, (name, height) in enumerate(zip(names, heights, strict=True)):
        left = 3 + i * step + 1
        marks.append(Mark(left + step / 2 - 1, 43, "bar", name, height))
        canvas.rectangle((left, 44 - 5.4 * height, left + step - 2, 44), jitter_color(rng, COLORS[name]))
    return names, heights, canvas.finish(), tuple(marks)


def bar_level(rng: np.random.Generator) -> Example:
    """The level of the first or the last bar."""
    names, heights, image, marks = _bars(rng)
    last = bool(rng.integers(2))
    asked = f"Level of the {'right' if last else 'left'} bar:"
    return Example(image, asked, str(heights[-1 if last else 0]), "bars", "bars " + ", ".join(names), marks)


def tallest_bar(rng: np.random.Generator) -> Example:
    """The colour of the tallest or the shortest bar."""
    names, heights, image, marks = _bars(rng)
    tallest = bool(rng.integers(2))
    answer = names[int(np.argmax(heights) if tallest else np.argmin(heights))]
    asked = f"Find the {'tallest' if tallest else 'shortest'} bar."
    return Example(image, asked, answer, "bars", "bars " + ", ".join(names), marks)


def read_print(rng: np.random.Generator) -> Example:
    """One to three printed digits, slanted and moved."""
    read = [_pick(rng, NUMBERS) for _ in range(int(rng.integers(1, 4)))]
    canvas = Canvas(_background(rng))
    color, height = jitter_color(rng, COLORS[_pick(rng, tuple(COLORS))], 40), int(rng.integers(20, 32))
    if rng.random() < 0.5:
        color = (245, 245, 245) if canvas.dark else (20, 20, 20)
    pitch = min(22.0, 44 / len(read))
    start = 24 - pitch * (len(read) - 1) / 2
    marks = []
    for i, digit in enumerate(read):
        x, y = start + pitch * i + rng.uniform(-1.5, 1.5), 24 + rng.uniform(-4, 4)
        canvas.text(digit, x, y, height, color)
        marks.append(Mark(x, y, f"digit {digit}", None))
    slant, stretch = rng.uniform(-0.3, 0.3), rng.uniform(0.85, 1.2)
    frame = (stretch, slant, 24 * (1 - stretch - slant), rng.uniform(-0.12, 0.12), 1.0, 0.0)
    image = canvas.finish()
    corner = image.getpixel((0, 0))
    image = image.transform(
        (SIZE, SIZE), Image.Transform.AFFINE, frame, Image.Resampling.BILINEAR, fillcolor=corner
    )
    answer = " ".join(read)
    return Example(image, "Read the digits.", answer, "print", f"digits {answer}", tuple(marks))


def repeat_text(rng: np.random.Generator) -> Example:
    """Words to be copied. Every word of the vocabulary occurs."""
    words = _some(rng, (*WORDS, *COLORS, *SHAPES, *NUMBERS, *LETTERS), int(rng.integers(1, 6)))
    return Example(None, f"Repeat: {' '.join(words)}", " ".join(words), None)


def _about(scene: Scene, question: str, answer: str) -> Example:
    marks = tuple(thing.mark for thing in scene.things)
    return Example(scene.image, question, answer, "scene", scene.caption, marks)


# Format sentences for the text tower; no instruction of the built-in stream ends in one of them.
FORMATS = (
    "Reply with one word only.",
    "Describe everything in full.",
    "Name the place in a word or two.",
    "Give the digits only.",
    "Give the letter of the code.",
    "Say how many there are.",
    "Repeat the words as they are.",
    "Tell the color and nothing else.",
)

MIXTURE: tuple[tuple[Callable[[np.random.Generator], Example], float], ...] = (
    (describe_long, 2.0),
    (name_shape, 1.5),
    (color_word, 1.2),
    (color_code, 1.2),
    (place, 1.5),
    (count, 2.0),
    (gauge, 0.7),
    (bar_level, 1.0),
    (tallest_bar, 0.7),
    (read_print, 1.5),
    (repeat_text, 0.7),
)


def draw_example(rng: np.random.Generator) -> tuple[Example, str]:
    """One example of the mixture and the name of its kind, drawn by weight."""
    weights = np.array([weight for _, weight in MIXTURE])
    kind = int(rng.choice(len(MIXTURE), p=weights / weights.sum()))
    make = MIXTURE[kind][0]
    return make(rng), make.__name__
