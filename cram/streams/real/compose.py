"""Pictures of 96 x 96 pixels, composed from collected drawings, scans and photos.

A class is no fixed image: place, size, angle, mirroring, light and ground differ from picture to picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

SIZE = 96

CARDS: dict[str, tuple[int, int, int]] = {
    "white": (244, 244, 242),
    "grey": (150, 150, 154),
    "green": (140, 196, 140),
    "blue": (140, 180, 232),
    "yellow": (240, 222, 130),
    "pink": (240, 172, 196),
}
# Words for where a thing lies on its card -> direction from the middle.
PLACES: dict[str, tuple[int, int]] = {
    "on the left of": (-1, 0),
    "on the right of": (1, 0),
    "in the middle of": (0, 0),
    "at the top of": (0, -1),
    "at the bottom of": (0, 1),
}


@dataclass(frozen=True)
class Look:
    """How a drawing is put on a picture.

    Attributes:
        x: Centre, in pixels from the left.
        y: Centre, in pixels from the top.
        width: Width of the upright drawing, in pixels.
        turn: Angle, in degrees against the clock.
        mirrored: True if left and right are exchanged.
        light: Factor of each colour channel.
    """

    x: float
    y: float
    width: float
    turn: float
    mirrored: bool = False
    light: tuple[float, float, float] = (1.0, 1.0, 1.0)


def draw_light(rng: np.random.Generator, low: float, high: float, tint: float) -> tuple[float, float, float]:
    """A brightness from `low` to `high`, and channels that differ from it by up to the share `tint`."""
    values = rng.uniform(low, high) * rng.uniform(1 - tint, 1 + tint, size=3)
    return float(values[0]), float(values[1]), float(values[2])


def lit(pixels: np.ndarray, light: Sequence[float]) -> np.ndarray:
    """Pixels [H, W, 3 or 4] with the colour channels times `light`, uint8."""
    changed = pixels.astype(np.float32)
    changed[..., :3] *= np.asarray(light, np.float32)
    return np.clip(changed + 0.5, 0, 255).astype(np.uint8)


def blank_card(rng: np.random.Generator, color: str) -> Image.Image:
    """A card of a colour of `CARDS`, unevenly lit from top to bottom."""
    base = np.asarray(CARDS[color]) + rng.integers(-8, 9, size=3)
    top, bottom = rng.uniform(-12, 12, size=2)
    ramp = np.linspace(top, bottom, SIZE)[:, None, None]
    rows = np.clip(base + ramp, 0, 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(rows, (SIZE, SIZE, 3))))


def place(picture: Image.Image, pixels: np.ndarray, look: Look) -> None:
    """Put a drawing [H, W, 4] on a picture."""
    height, width = pixels.shape[:2]
    drawn = Image.fromarray(lit(pixels[:, ::-1] if look.mirrored else pixels, look.light))
    size = (max(1, round(look.width)), max(1, round(look.width * height / width)))
    drawn = drawn.resize(size, Image.Resampling.LANCZOS)
    drawn = drawn.rotate(look.turn, Image.Resampling.BICUBIC, expand=True)
    corner = (round(look.x - drawn.width / 2), round(look.y - drawn.height / 2))
    picture.paste(drawn, corner, drawn)


def crop(rng: np.random.Generator, photo: np.ndarray, low: int, high: int) -> Image.Image:
    """A square of `low` to `high` pixels out of a photo [H, W, 4], scaled to `SIZE`, perhaps mirrored."""
    edge = int(rng.integers(low, high + 1))
    top, left = (int(rng.integers(side - edge + 1)) for side in photo.shape[:2])
    square = photo[top : top + edge, left : left + edge, :3]
    if rng.integers(2):
        square = square[:, ::-1]
    shown = lit(square, draw_light(rng, 0.85, 1.15, 0.04))
    return Image.fromarray(shown).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
