"""The collected pictures: sets of small drawings and photos, each set one file in `assets/`.

`assets/index.json` lists the sets: use ("stream" or "free"), names, size of a picture, columns of the sheet,
category of each name, and the file with the licence. `python -m cram.streams.real.collect` writes all of it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class PictureSet:
    """The pictures of one set, in the order of their names.

    Attributes:
        name: A name in `set_names()`.
        use: "stream" if the tasks of `builtin-real` show the set, else "free".
        names: What each picture shows, such as "fox". Only digits and photos repeat names.
        categories: The category of each picture in its package, or "" for none.
        pixels: RGBA, uint8 [N, H, W, 4]. Outside of a drawing, alpha is 0.
    """

    name: str
    use: str
    names: tuple[str, ...]
    categories: tuple[str, ...]
    pixels: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def picture(self, name: str) -> Image.Image:
        """The first picture of the given name, in RGBA.

        Raises:
            ValueError: If the set has no picture of that name.
        """
        if name not in self.names:
            raise ValueError(f"name must be one of the {len(self)} names of {self.name}, got {name!r}")
        return Image.fromarray(self.pixels[self.names.index(name)], "RGBA")


@lru_cache(maxsize=1)
def _index() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((ASSETS / "index.json").read_text(encoding="utf-8"))
    return content


def set_names(use: str | None = None) -> tuple[str, ...]:
    """The names of all sets, or of those for one use ("stream" or "free")."""
    return tuple(name for name, entry in _index().items() if use in (None, entry["use"]))


@lru_cache(maxsize=32)
def load_set(name: str) -> PictureSet:
    """Read a set of pictures.

    Raises:
        ValueError: If there is no set of that name.
    """
    if name not in _index():
        raise ValueError(f"name must be one of {set_names()}, got {name!r}")
    entry = _index()[name]
    with Image.open(ASSETS / entry["file"]) as opened:
        sheet = np.asarray(opened.convert("RGBA"))
    (width, height), columns, count = entry["size"], entry["columns"], len(entry["names"])
    rows = sheet.shape[0] // height
    cells = sheet.reshape(rows, height, columns, width, 4).swapaxes(1, 2)
    pixels = np.ascontiguousarray(cells.reshape(-1, height, width, 4)[:count])
    pixels.flags.writeable = False
    categories = entry["categories"] or [""] * count
    return PictureSet(name, entry["use"], tuple(entry["names"]), tuple(categories), pixels)


@lru_cache(maxsize=1)
def load_tables() -> tuple[dict[str, Any], ...]:
    """Series of small whole numbers from public statistics, each with title, name, split and values."""
    return tuple(json.loads((ASSETS / "tables.json").read_text(encoding="utf-8")))
