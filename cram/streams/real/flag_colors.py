"""The colours of a flag by region: what the questions of flag-colour are about."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from cram.streams.real.sheets import load_set

# Words for a region -> top, bottom, left and right edge, as shares of the flag.
REGIONS: dict[str, tuple[float, float, float, float]] = {
    "on the left of the flag": (0.1, 0.9, 0.03, 0.22),
    "on the right of the flag": (0.1, 0.9, 0.78, 0.97),
    "at the top of the flag": (0.03, 0.22, 0.1, 0.9),
    "at the bottom of the flag": (0.78, 0.97, 0.1, 0.9),
    "in the middle of the flag": (0.4, 0.6, 0.4, 0.6),
}
COLORS = ("red", "orange", "yellow", "green", "blue", "white", "black")
# Upper edge of each hue in degrees, from 0 on.
_HUES = ((16, "red"), (40, "orange"), (66, "yellow"), (170, "green"), (262, "blue"), (335, ""), (361, "red"))
# A question is asked if one colour fills this share of the region.
CLEAR = 0.65


def color_names(pixels: np.ndarray) -> np.ndarray:
    """The index in `COLORS` of each pixel of [..., 3] uint8, -1 for tones that have no plain name."""
    values = pixels.astype(np.float64) / 255
    high, low = values.max(-1), values.min(-1)
    spread = high - low
    red, green, blue = np.moveaxis(values, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        hue = np.select(
            [high == red, high == green],
            [(green - blue) / spread, 2 + (blue - red) / spread],
            4 + (red - green) / spread,
        )
    degrees = np.nan_to_num(60 * hue) % 360
    edges = [edge for edge, _ in _HUES]
    by_hue = np.array([COLORS.index(name) if name else -1 for _, name in _HUES])
    names = by_hue[np.searchsorted(edges, degrees, side="right")]
    plain = spread < 0.22 * np.maximum(high, 1e-9)
    names = np.where(plain, np.where(high > 0.8, COLORS.index("white"), -1), names)
    return np.where(high < 0.24, COLORS.index("black"), names)


@lru_cache(maxsize=1)
def clear_regions() -> dict[str, dict[str, str]]:
    """Flag -> region -> colour, for the regions that one colour fills by the share `CLEAR`."""
    flags = load_set("flags")
    return {name: _regions(pixels[..., :3]) for name, pixels in zip(flags.names, flags.pixels, strict=True)}


def _regions(flag: np.ndarray) -> dict[str, str]:
    height, width = flag.shape[:2]
    found = {}
    for region, (top, bottom, left, right) in REGIONS.items():
        part = color_names(
            flag[round(top * height) : round(bottom * height), round(left * width) : round(right * width)]
        )
        shares = np.bincount(part.ravel() + 1, minlength=len(COLORS) + 1)[1:] / part.size
        if shares.max() >= CLEAR:
            found[region] = COLORS[int(shares.argmax())]
    return found
