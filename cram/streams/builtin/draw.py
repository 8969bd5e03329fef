"""Drawing primitives of the built-in images: shapes, bars, glyphs and paper on a 48 x 48 canvas.

Everything is drawn at twice the final size and averaged down, so that edges are smooth. The built-in stream
and the pretraining mixture of the built-in base share these primitives and nothing else.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 48
_SUPERSAMPLING = 2

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (224, 44, 44),
    "green": (40, 168, 70),
    "blue": (48, 92, 224),
    "yellow": (240, 208, 40),
    "purple": (150, 60, 190),
    "orange": (244, 136, 28),
}

Point = tuple[float, float]


def _regular(corners: int, turn: float = 0.0) -> list[Point]:
    angles = [2 * math.pi * (i / corners + turn) - math.pi / 2 for i in range(corners)]
    return [(math.cos(a), math.sin(a)) for a in angles]


def _star() -> list[Point]:
    return [
        (math.cos(a) * r, math.sin(a) * r)
        for i in range(10)
        for a, r in [(math.pi * i / 5 - math.pi / 2, 1.0 if i % 2 == 0 else 0.42)]
    ]


def _heart() -> list[Point]:
    angles = [2 * math.pi * i / 24 for i in range(24)]
    return [
        (
            16 * math.sin(a) ** 3 / 17,
            -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 17,
        )
        for a in angles
    ]


def _cross() -> list[Point]:
    w = 0.34
    return [
        (-w, -1),
        (w, -1),
        (w, -w),
        (1, -w),
        (1, w),
        (w, w),
        (w, 1),
        (-w, 1),
        (-w, w),
        (-1, w),
        (-1, -w),
        (-w, -w),
    ]


SHAPES: dict[str, list[Point]] = {
    "circle": _regular(28),
    "square": [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
    "triangle": [(0.0, -1.0), (0.95, 0.8), (-0.95, 0.8)],
    "star": _star(),
    "cross": _cross(),
    "diamond": [(0.0, -1.0), (0.66, 0.0), (0.0, 1.0), (-0.66, 0.0)],
    "heart": _heart(),
    "ring": _regular(28),
}


class Canvas:
    """A 48 x 48 RGB picture in final pixel coordinates, drawn supersampled."""

    def __init__(self, background: tuple[int, int, int] | np.ndarray) -> None:
        edge = SIZE * _SUPERSAMPLING
        if isinstance(background, np.ndarray):
            self._image = Image.fromarray(background).resize((edge, edge), Image.Resampling.BILINEAR)
        else:
            self._image = Image.new("RGB", (edge, edge), background)
        self._draw = ImageDraw.Draw(self._image)

    @property
    def dark(self) -> bool:
        """True if the top left corner is darker than middle grey."""
        pixel = self._image.getpixel((0, 0))
        return isinstance(pixel, tuple) and sum(pixel[:3]) < 3 * 128

    def finish(self) -> Image.Image:
        """The picture at its final size."""
        return self._image.resize((SIZE, SIZE), Image.Resampling.BOX)

    def polygon(self, points: list[Point], fill: tuple[int, int, int]) -> None:
        """A filled polygon."""
        self._draw.polygon([(x * _SUPERSAMPLING, y * _SUPERSAMPLING) for x, y in points], fill=fill)

    def line(self, points: list[Point], fill: tuple[int, int, int], width: float) -> None:
        """A polyline with round joints."""
        scaled = [(x * _SUPERSAMPLING, y * _SUPERSAMPLING) for x, y in points]
        self._draw.line(scaled, fill=fill, width=max(1, round(width * _SUPERSAMPLING)), joint="curve")

    def rectangle(self, box: tuple[float, float, float, float], fill: tuple[int, int, int]) -> None:
        """A filled axis-parallel rectangle (left, top, right, bottom)."""
        self._draw.rectangle([round(v * _SUPERSAMPLING) for v in box], fill=fill)

    def disc(self, x: float, y: float, radius: float, fill: tuple[int, int, int]) -> None:
        """A filled circle."""
        box = [v * _SUPERSAMPLING for v in (x - radius, y - radius, x + radius, y + radius)]
        self._draw.ellipse(box, fill=fill)

    def shape(
        self, name: str, x: float, y: float, radius: float, fill: tuple[int, int, int], turn: float = 0.0
    ) -> None:
        """A filled shape of `SHAPES`; a ring keeps a hole in a dark tone of its colour."""
        self.polygon(outline(name, x, y, radius, turn), fill)
        if name == "ring":
            self.disc(x, y, radius * 0.52, (24, 24, 28))

    def text(self, text: str, x: float, y: float, height: int, fill: tuple[int, int, int]) -> None:
        """Printed text centred on (x, y)."""
        font = _font(height * _SUPERSAMPLING)
        self._draw.text((x * _SUPERSAMPLING, y * _SUPERSAMPLING), text, font=font, fill=fill, anchor="mm")


@lru_cache(maxsize=32)
def _font(height: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=height)


def outline(name: str, x: float, y: float, radius: float, turn: float = 0.0) -> list[Point]:
    """The corners of a shape around (x, y), turned by `turn` radians."""
    cos, sin = math.cos(turn) * radius, math.sin(turn) * radius
    return [(x + px * cos - py * sin, y + px * sin + py * cos) for px, py in SHAPES[name]]


def jitter_color(
    rng: np.random.Generator, color: tuple[int, int, int], spread: int = 14
) -> tuple[int, int, int]:
    """The colour with each channel moved by up to `spread`."""
    moved = np.clip(np.asarray(color) + rng.integers(-spread, spread + 1, size=3), 0, 255)
    return int(moved[0]), int(moved[1]), int(moved[2])


def noise_background(
    rng: np.random.Generator, base: tuple[int, int, int], spread: int, cells: int
) -> np.ndarray:
    """A coarse random texture [cells, cells, 3] around a base colour; `Canvas` scales it up."""
    texture = np.asarray(base) + rng.integers(-spread, spread + 1, size=(cells, cells, 1))
    return np.clip(texture, 0, 255).astype(np.uint8)


def gradient_background(top: tuple[int, int, int], bottom: tuple[int, int, int]) -> np.ndarray:
    """A vertical gradient [48, 48, 3]."""
    ramp = np.linspace(0.0, 1.0, SIZE)[:, None, None]
    column = np.asarray(top) * (1 - ramp) + np.asarray(bottom) * ramp
    return np.broadcast_to(column, (SIZE, SIZE, 3)).astype(np.uint8)
