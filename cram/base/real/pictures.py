"""Pictures of the second base's training: grounds, pasted drawings, and the free picture sets.

Only sets whose use is "free" are read, so no picture of the stream `builtin-real` is ever shown in training.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from cram.base.real.tower import SIZE
from cram.streams.real.sheets import load_set

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40), "orange": (244, 140, 30), "yellow": (250, 210, 30), "green": (40, 150, 70),
    "blue": (40, 80, 190), "purple": (130, 60, 160), "pink": (245, 150, 190), "brown": (125, 80, 45),
    "black": (20, 20, 20), "white": (245, 245, 245), "grey": (130, 130, 130),
}  # fmt: skip
# Name -> (photo of scikit-learn or set of photos, left, top, right, bottom).
REGIONS: dict[str, tuple[str, int, int, int, int]] = {
    "sky": ("china.jpg", 340, 0, 640, 130),
    "water": ("china.jpg", 400, 225, 545, 290),
    "bush": ("china.jpg", 380, 300, 570, 425),
    "tree": ("china.jpg", 560, 150, 640, 420),
    "temple": ("china.jpg", 80, 100, 340, 360),
    "petals": ("flower.jpg", 190, 100, 430, 340),
    "leaf": ("flower.jpg", 0, 40, 150, 330),
    "field": ("photos-free", 0, 120, 256, 256),
    "cell": ("photos-free", 90, 60, 256, 226),
    "clock": ("photos-free", 20, 40, 236, 216),
    "vessels": ("photos-free", 0, 0, 256, 256),
}
PATTERNS = ("stripes", "checks", "dots", "noise", "waves", "rings")
LONGEST_NAME = 16

RNG = np.random.Generator


@dataclass(frozen=True)
class Drawing:
    """A drawing with its name and the kind of thing it shows."""

    name: str
    kind: str
    picture: Image.Image


def pick(rng: RNG, items: list[str] | tuple[str, ...]) -> str:
    """One of several words."""
    return items[int(rng.integers(len(items)))]


@lru_cache(maxsize=1)
def drawings() -> tuple[tuple[Drawing, ...], ...]:
    """The free drawings: Fluent's, Noto's beside the animals, and symbols; names of one or two words."""
    kinds = {
        "Animals & Nature": "animal", "Food & Drink": "food", "Objects": "object", "Activities": "activity",
        "Travel & Places": "place", "Smileys & Emotion": "face",
    }  # fmt: skip
    found = []
    for name in ("fluent", "noto", "symbols"):
        source = load_set(name)
        found.append(
            tuple(
                Drawing(shown, kinds.get(category, "symbol"), Image.fromarray(pixels))
                for shown, category, pixels in zip(
                    source.names, source.categories, source.pixels, strict=True
                )
                if shown.count(" ") < 2 and len(shown) <= LONGEST_NAME and not any(map(str.isdigit, shown))
            )
        )
    return tuple(found)


@lru_cache(maxsize=4)
def _photo(name: str) -> Image.Image:
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image(name))


def region(name: str) -> Image.Image:
    """The part of a photo that shows a surface of `REGIONS`."""
    source, *box = REGIONS[name]
    whole = load_set(source).picture(name).convert("RGB") if source == "photos-free" else _photo(source)
    return whole.crop((box[0], box[1], box[2], box[3]))


def surface(rng: RNG, name: str) -> Image.Image:
    """A random square of a surface, turned and mirrored at random, 128 x 128."""
    whole = region(name)
    side = int(min(whole.size) * rng.uniform(0.4, 1.0))
    left, top = (int(rng.integers(0, length - side + 1)) for length in whole.size)
    cut = whole.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    factor = rng.uniform(0.75, 1.25)
    return cut.point([min(255, int(value * factor)) for value in range(256)] * 3)


def pattern(rng: RNG, name: str) -> Image.Image:
    """A drawn pattern of `PATTERNS` in two colours, 128 x 128."""
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    turn, pitch = rng.uniform(0, np.pi), rng.uniform(9, 26)
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    a, b = np.sin(2 * np.pi * u / pitch), np.sin(2 * np.pi * v / pitch)
    center = rng.uniform(40, 88, 2)
    values = {
        "stripes": a > 0,
        "checks": (a > 0) ^ (b > 0),
        "dots": a + b > 0.9,
        "noise": rng.random((SIZE, SIZE)) > 0.5,
        "waves": np.sin(2 * np.pi * (u + 5 * np.sin(v / 8)) / pitch) > 0,
        "rings": np.sin(2 * np.pi * np.hypot(x - center[0], y - center[1]) / pitch) > 0,
    }[name]
    first, second = rng.integers(0, 256, 3), rng.integers(0, 256, 3)
    return Image.fromarray(np.where(values[..., None], first, second).astype(np.uint8))


def shade(rng: RNG, color: str, spread: int = 18) -> tuple[int, int, int]:
    """A colour near the named one."""
    values = np.clip(np.array(COLORS[color]) + rng.integers(-spread, spread + 1, 3), 0, 255)
    return int(values[0]), int(values[1]), int(values[2])


def ground(rng: RNG) -> tuple[Image.Image, str | None]:
    """A ground to draw on and the name of its colour, None if it has no one colour."""
    kind = rng.random()
    if kind < 0.5:
        color = pick(rng, tuple(COLORS))
        return Image.new("RGB", (SIZE, SIZE), shade(rng, color)), color
    if kind < 0.7:
        return surface(rng, pick(rng, tuple(REGIONS))), None
    top, bottom = rng.integers(0, 256, 3), rng.integers(0, 256, 3)
    share = np.linspace(0, 1, SIZE)[:, None, None]
    rows = np.broadcast_to(top * (1 - share) + bottom * share, (SIZE, SIZE, 3))
    rough = rng.normal(0, rng.choice([0, 8, 20]), (SIZE, SIZE, 1))
    return Image.fromarray(np.clip(rows + rough, 0, 255).astype(np.uint8)), None


def paste(rng: RNG, onto: Image.Image, drawn: Image.Image, size: int, x: float, y: float) -> None:
    """Paste a drawing of a given edge around a point, turned a little and perhaps mirrored."""
    width = size if drawn.width == drawn.height else int(size * drawn.width / drawn.height)
    shown = drawn.resize((width, size), Image.Resampling.BILINEAR)
    shown = shown.rotate(float(rng.uniform(-12, 12)), Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        shown = shown.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    onto.paste(shown, (int(x - width / 2), int(y - size / 2)), shown)


@lru_cache(maxsize=1)
def _scans() -> tuple[np.ndarray, np.ndarray]:
    source = load_set("digits-free")
    return source.pixels[..., 0], np.array([int(name) for name in source.names])


def digit(rng: RNG, value: int, size: int, tint: tuple[int, int, int]) -> Image.Image:
    """A handwritten scan of a digit, its ink as alpha, RGBA of the given edge."""
    scans, labels = _scans()
    chosen = np.flatnonzero(labels == value)
    ink = Image.fromarray(scans[chosen[int(rng.integers(len(chosen)))]]).resize(
        (size, size), Image.Resampling.BICUBIC
    )
    drawn = Image.new("RGBA", (size, size), (*tint, 255))
    drawn.putalpha(ink)
    return drawn


def color_of(pixels: np.ndarray) -> str:
    """The name of the colour that most pixels [N, 3] are nearest to."""
    known = np.array(list(COLORS.values()))
    nearest = ((pixels[:, None, :].astype(int) - known) ** 2).sum(2).argmin(1)
    return list(COLORS)[int(np.bincount(nearest, minlength=len(known)).argmax())]


def bars(rng: RNG, values: list[int], colors: list[str], highest: int, marked: int) -> Image.Image:
    """A bar chart with a grid line per unit, one colour per bar, and an arrow below the marked bar."""
    light = rng.random() < 0.8
    paper, ink = ((250, 250, 250), (60, 60, 60)) if light else ((30, 30, 36), (200, 200, 200))
    chart = Image.new("RGB", (SIZE, SIZE), paper)
    draw = ImageDraw.Draw(chart)
    left, right, low, high = 14, 124, 114, 8
    unit, step = (low - high) / highest, (right - left) / len(values)
    if rng.random() < 0.8:
        for level in range(1, highest + 1):
            draw.line([(left, low - unit * level), (right, low - unit * level)], (190, 190, 190))
    for i, (value, color) in enumerate(zip(values, colors, strict=True)):
        x = left + step * i + step * 0.15
        draw.rectangle([x, low - unit * value, x + step * 0.7, low], shade(rng, color))
    x = left + step * (marked + 0.5)
    draw.polygon([(x, low + 2), (x - 5, low + 11), (x + 5, low + 11)], shade(rng, "red"))
    draw.line([(left, high), (left, low), (right, low)], ink, 2)
    if rng.random() < 0.6:
        for level in range(1, highest + 1):
            draw.text((3, low - unit * level - 5), str(level), ink)
    return chart
