"""Bar charts of real series: a few consecutive values, one bar marked by its colour."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cram.streams.real.compose import SIZE
from cram.streams.real.sheets import load_tables

HIGHEST = 9
_SCALE = 2
_LEFT, _RIGHT, _TOP, _BOTTOM = 13, 93, 5, 88
_MARKED = ((206, 52, 44), (40, 120, 210), (226, 140, 20), (40, 150, 80))


@dataclass(frozen=True)
class Window:
    """Consecutive values of a series, what they are about, and the index of the marked value."""

    title: str
    values: tuple[int, ...]
    marked: int


@lru_cache(maxsize=2)
def _places(split: str) -> dict[int, list[tuple[str, tuple[int, ...], int]]]:
    """Value -> all places in the split's series that hold it, as (title, series, index)."""
    found: dict[int, list[tuple[str, tuple[int, ...], int]]] = {}
    for row in load_tables():
        if row["split"] == split:
            values = tuple(row["values"])
            for i, value in enumerate(values):
                found.setdefault(value, []).append((row["title"], values, i))
    return found


def draw_window(rng: np.random.Generator, split: str) -> Window:
    """Four to six consecutive values. Each value from 1 to 9 is marked equally often."""
    places = _places(split)[int(rng.integers(1, HIGHEST + 1))]
    title, series, index = places[int(rng.integers(len(places)))]
    count = min(len(series), int(rng.integers(4, 7)))
    first = int(rng.integers(max(0, index - count + 1), min(index, len(series) - count) + 1))
    return Window(title, series[first : first + count], index - first)


def draw_chart(rng: np.random.Generator, window: Window) -> Image.Image:
    """The chart of a window, with a line for each value and a label for every third one."""
    paper = int(rng.integers(232, 256))
    picture = Image.new("RGB", (SIZE * _SCALE, SIZE * _SCALE), (paper, paper, paper))
    draw = ImageDraw.Draw(picture)
    step = (_BOTTOM - _TOP) / HIGHEST
    for level in range(1, HIGHEST + 1):
        y = _BOTTOM - level * step
        tone = 168 if level % 3 == 0 else 214
        draw.line(_scaled(_LEFT, y, _RIGHT, y), fill=(tone, tone, tone), width=1)
        if level % 3 == 0:
            draw.text((7 * _SCALE, y * _SCALE), str(level), font=_font(), fill=(40, 40, 40), anchor="mm")
    _draw_bars(rng, draw, window, step)
    draw.line(_scaled(_LEFT, _TOP - 2, _LEFT, _BOTTOM, _RIGHT, _BOTTOM), fill=(40, 40, 40), width=2)
    return picture.resize((SIZE, SIZE), Image.Resampling.BOX)


def _draw_bars(rng: np.random.Generator, draw: ImageDraw.ImageDraw, window: Window, step: float) -> None:
    marked = np.asarray(_MARKED[int(rng.integers(len(_MARKED)))]) + rng.integers(-18, 19, size=3)
    plain = int(rng.integers(110, 165))
    room = (_RIGHT - _LEFT - 2) / len(window.values)
    share = rng.uniform(0.55, 0.85)
    for i, value in enumerate(window.values):
        middle = _LEFT + 2 + room * (i + 0.5)
        color = np.clip(marked, 0, 255) if i == window.marked else np.array([plain, plain, plain + 8])
        box = _scaled(middle - room * share / 2, _BOTTOM - value * step, middle + room * share / 2, _BOTTOM)
        draw.rectangle(box, fill=(int(color[0]), int(color[1]), int(color[2])))


def _scaled(*values: float) -> list[int]:
    return [round(value * _SCALE) for value in values]


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=10 * _SCALE)
