"""The pictures of the long built-in streams. A layout decides the objects, a style decides their look.

A layout draws a `Scene` from a random generator, and a style turns a scene into a picture. Every layout works
with every style. A domain of `long.py` is one layout in one style.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from cram.streams.builtin.draw import (
    COLORS,
    SHAPES,
    SIZE,
    Canvas,
    Point,
    gradient_background,
    jitter_color,
    noise_background,
    outline,
)
from cram.streams.builtin.tasks import CORNERS

Rgb = tuple[int, int, int]

UNLIT: Rgb = (118, 122, 128)
BASELINE = 43.0
LEVEL_HEIGHT = 6.0


@dataclass(frozen=True)
class Thing:
    """One object: a shape, a "bar" of some level or a "digit" of some level, with where and how it lies.

    An object whose `color` is None is unlit and grey. A digit without a colour gets the one that shows best.
    """

    kind: str
    color: str | None
    x: float
    y: float
    radius: float
    turn: float = 0.0
    level: int = 0
    large: bool = True


@dataclass(frozen=True)
class Scene:
    """The objects of a picture in reading order. `vertical`: one object of a pair lies above the other."""

    things: tuple[Thing, ...]
    vertical: bool = False


Layout = Callable[[np.random.Generator], Scene]


def choose(rng: np.random.Generator, names: list[str], count: int) -> list[str]:
    """`count` different names in random order."""
    return [names[i] for i in rng.permutation(len(names))[:count]]


def single(rng: np.random.Generator) -> Scene:
    """One shape of any colour in the middle."""
    (shape,), (color,) = choose(rng, list(SHAPES), 1), choose(rng, list(COLORS), 1)
    x, y = rng.uniform(20, 28, size=2)
    return Scene((Thing(shape, color, x, y, rng.uniform(13, 18), rng.uniform(-0.25, 0.25)),))


def pair(rng: np.random.Generator) -> Scene:
    """Two different shapes, each large or small, beside or above each other."""
    vertical, things = bool(rng.integers(2)), []
    for i, shape in enumerate(choose(rng, list(SHAPES), 2)):
        along, across = (13 if i == 0 else 35) + rng.uniform(-2, 2), 24 + rng.uniform(-4, 4)
        x, y = (across, along) if vertical else (along, across)
        large, (color,) = bool(rng.integers(2)), choose(rng, list(COLORS), 1)
        radius = 10.0 if large else 5.5
        things.append(Thing(shape, color, x, y, radius, rng.uniform(-0.2, 0.2), large=large))
    return Scene(tuple(things), vertical)


def corners(rng: np.random.Generator) -> Scene:
    """Four different shapes in the corners, one of them lit in a colour."""
    lit, (color,) = int(rng.integers(4)), choose(rng, list(COLORS), 1)
    shapes = choose(rng, list(SHAPES), 4)
    return Scene(
        tuple(
            Thing(shape, color if i == lit else None, x, y, rng.uniform(6.5, 8.0))
            for i, (shape, (x, y)) in enumerate(zip(shapes, CORNERS.values(), strict=True))
        )
    )


def crowd(rng: np.random.Generator) -> Scene:
    """One to five circles of one or two colours."""
    colors, things = choose(rng, list(COLORS), 2), []
    for cell in rng.permutation(6)[: int(rng.integers(1, 6))]:
        x, y = 9 + 15 * (cell % 3) + rng.uniform(-1.5, 1.5), 14 + 20 * (cell // 3) + rng.uniform(-2, 2)
        things.append(Thing("circle", colors[int(rng.integers(2))], x, y, 5.5))
    return Scene(tuple(things))


def bars(rng: np.random.Generator) -> Scene:
    """Three or four bars of different colours and different levels from 1 to 6."""
    count = int(rng.integers(3, 5))
    levels = rng.permutation(6)[:count] + 1
    step = 38 / count
    return Scene(
        tuple(
            Thing("bar", color, 8 + (i + 0.5) * step, BASELINE, step / 2 - 1.5, level=int(level))
            for i, (color, level) in enumerate(zip(choose(rng, list(COLORS), count), levels, strict=True))
        )
    )


def digit(rng: np.random.Generator) -> Scene:
    """One printed digit."""
    x, y = rng.uniform(22.5, 25.5), rng.uniform(21, 27)
    return Scene((Thing("digit", None, x, y, rng.uniform(12, 16), level=int(rng.integers(10))),))


LAYOUTS: dict[str, Layout] = {f.__name__: f for f in (single, pair, corners, crowd, bars, digit)}


@dataclass(frozen=True)
class Style:
    """A ground and a pen.

    Attributes:
        ground: Colour of the ground.
        fade: Colour that the ground fades to at the bottom.
        grain: Spread of the random texture. Only a ground that does not fade has a texture.
        cells: Size of the texture's grid.
        pattern: Name in `PATTERNS` of the lines over the ground.
        ink: Colour of the pattern.
        pen: Name in `PENS`.
    """

    ground: Rgb
    fade: Rgb | None = None
    grain: int = 4
    cells: int = 12
    pattern: str = "none"
    ink: Rgb = (128, 128, 128)
    pen: str = "fill"


STYLES: dict[str, Style] = {
    "paper": Style((222, 212, 190), grain=14, pen="pencil"),
    "white": Style((248, 248, 248), grain=2, pattern="levels", ink=(214, 214, 214)),
    "sky": Style((150, 190, 235), fade=(90, 150, 80)),
    "tiles": Style((235, 235, 240), pen="tile"),
    "floor": Style((70, 70, 78), fade=(128, 124, 118), pen="shadow"),
    "board": Style((32, 62, 48), grain=8, pen="pencil"),
    "blueprint": Style((14, 30, 74), pattern="grid", ink=(44, 66, 124), pen="outline"),
    "neon": Style((10, 8, 16), pen="outline"),
    "sand": Style((176, 146, 104), grain=24, cells=24),
    "snow": Style((240, 246, 252), fade=(196, 208, 230), pen="shadow"),
    "wall": Style((100, 76, 72), pattern="bricks", ink=(74, 54, 52)),
    "cloth": Style((242, 226, 236), pattern="stripes", ink=(222, 190, 212)),
    "night": Style((8, 10, 34), fade=(62, 52, 92), pattern="stars", ink=(230, 230, 210)),
}  # fmt: skip


def render(rng: np.random.Generator, scene: Scene, style: Style) -> Image.Image:
    """Return the picture of a scene. The generator moves the ground, the ink and the pen a little."""
    ground = jitter_color(rng, style.ground, 6)
    if style.fade is None:
        canvas = Canvas(noise_background(rng, ground, style.grain, style.cells))
    else:
        canvas = Canvas(gradient_background(ground, jitter_color(rng, style.fade, 6)))
    PATTERNS[style.pattern](rng, canvas, style.ink)
    for thing in scene.things:
        color = jitter_color(rng, COLORS[thing.color]) if thing.color else UNLIT
        PENS[style.pen](rng, canvas, thing, color)
    return canvas.finish()


def _points(thing: Thing) -> list[Point]:
    if thing.kind != "bar":
        return outline(thing.kind, thing.x, thing.y, thing.radius, thing.turn)
    left, right, top = thing.x - thing.radius, thing.x + thing.radius, BASELINE - LEVEL_HEIGHT * thing.level
    return [(left, top), (right, top), (right, BASELINE), (left, BASELINE)]


def _fill(rng: np.random.Generator, canvas: Canvas, thing: Thing, color: Rgb) -> None:
    if thing.kind == "digit":
        ink = (240, 240, 240) if canvas.dark else (24, 24, 24)
        canvas.text(str(thing.level), thing.x, thing.y, round(2 * thing.radius), ink)
    elif thing.kind == "bar":
        canvas.polygon(_points(thing), color)
    else:
        canvas.shape(thing.kind, thing.x, thing.y, thing.radius, color, thing.turn)


def _outline(rng: np.random.Generator, canvas: Canvas, thing: Thing, color: Rgb) -> None:
    if thing.kind == "digit":
        return _fill(rng, canvas, thing, color)
    points = _points(thing)
    canvas.line([*points, points[0]], color, 1.6)
    if thing.kind == "ring":
        inner = outline("circle", thing.x, thing.y, thing.radius * 0.55)
        canvas.line([*inner, inner[0]], color, 1.2)


def _pencil(rng: np.random.Generator, canvas: Canvas, thing: Thing, color: Rgb) -> None:
    if thing.kind == "digit":
        return _fill(rng, canvas, thing, color)
    for _ in range(2):
        points = [(x + rng.normal(0, 0.45), y + rng.normal(0, 0.45)) for x, y in _points(thing)]
        canvas.line([*points, points[0]], color, 1.0)
    if thing.kind == "ring":
        inner = outline("circle", thing.x, thing.y, thing.radius * 0.55)
        canvas.line([*inner, inner[0]], color, 1.2)


def _shadow(rng: np.random.Generator, canvas: Canvas, thing: Thing, color: Rgb) -> None:
    moved = Thing(thing.kind, None, thing.x + 1.4, thing.y + 1.8, thing.radius, thing.turn, thing.level)
    _fill(rng, canvas, moved, (50, 48, 46))
    _fill(rng, canvas, thing, color)


def _tile(rng: np.random.Generator, canvas: Canvas, thing: Thing, color: Rgb) -> None:
    tile, edge = jitter_color(rng, (34, 52, 74), 6), thing.radius + 2.5
    if thing.kind == "digit":
        return _fill(rng, canvas, thing, color)
    if thing.kind == "bar":
        canvas.rectangle((thing.x - edge + 1, 4, thing.x + edge - 1, BASELINE + 1), tile)
    else:
        canvas.rectangle((thing.x - edge, thing.y - edge, thing.x + edge, thing.y + edge), tile)
    _fill(rng, canvas, thing, color)


Pen = Callable[[np.random.Generator, Canvas, Thing, Rgb], None]
PENS: dict[str, Pen] = {
    "fill": _fill,
    "outline": _outline,
    "pencil": _pencil,
    "shadow": _shadow,
    "tile": _tile,
}


def _none(rng: np.random.Generator, canvas: Canvas, ink: Rgb) -> None:
    """An even ground."""


def _levels(rng: np.random.Generator, canvas: Canvas, ink: Rgb) -> None:
    for level in range(1, 7):
        y = BASELINE - LEVEL_HEIGHT * level
        canvas.line([(7, y), (46, y)], ink, 0.5)
    canvas.line([(7, 5), (7, BASELINE), (46, BASELINE)], (40, 40, 40), 1.0)


def _grid(rng: np.random.Generator, canvas: Canvas, ink: Rgb) -> None:
    start = rng.uniform(0, 6)
    for v in np.arange(start, SIZE, 6.0):
        canvas.line([(v, 0), (v, SIZE)], ink, 0.5)
        canvas.line([(0, v), (SIZE, v)], ink, 0.5)


def _bricks(rng: np.random.Generator, canvas: Canvas, ink: Rgb) -> None:
    shift = rng.uniform(0, 6)
    for row in range(-1, 9):
        y = shift + 6 * row
        canvas.line([(0, y), (SIZE, y)], ink, 0.8)
        for x in np.arange(6.0 * (row % 2), SIZE, 12.0):
            canvas.line([(x, y), (x, y + 6)], ink, 0.8)


def _stripes(rng: np.random.Generator, canvas: Canvas, ink: Rgb) -> None:
    for x in np.arange(rng.uniform(-56, -48), SIZE, 8.0):
        canvas.line([(x, SIZE), (x + SIZE, 0)], ink, 2.4)


def _stars(rng: np.random.Generator, canvas: Canvas, ink: Rgb) -> None:
    for x, y in rng.uniform(1, SIZE - 1, size=(14, 2)):
        canvas.disc(float(x), float(y), 0.45 * math.sqrt(1 + rng.random()), ink)


PATTERNS: dict[str, Callable[[np.random.Generator, Canvas, Rgb], None]] = {
    "none": _none,
    "levels": _levels,
    "grid": _grid,
    "bricks": _bricks,
    "stripes": _stripes,
    "stars": _stars,
}
