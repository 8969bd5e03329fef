"""The ten tasks of `builtin-real`. Pictures and forms of answer vary independently.

| task | pictures | answer | same pictures as | same form as |
|---|---|---|---|---|
| animal-pick | Noto animals | letter | animal-caption | flag-pick, animal-pick-2, digit-pick |
| digit-read | two scans of digits | number | digit-pick | food-count, chart-value |
| flag-pick | flags | letter | flag-colour | animal-pick, animal-pick-2, digit-pick |
| food-count | Twemoji foods on a photographed surface | number | | digit-read, chart-value |
| animal-caption | Noto animals | caption | animal-pick | |
| animal-pick-2 | Twemoji animals | letter | (near animal-pick) | animal-pick, flag-pick, digit-pick |
| surface-word | photos of surfaces | word | | flag-colour |
| flag-colour | flags | word | flag-pick | surface-word |
| digit-pick | two scans of digits | letter | digit-read | animal-pick, flag-pick, animal-pick-2 |
| chart-value | bar charts of public statistics | number | | digit-read, food-count |

Tasks with the same pictures draw them by the same function, so only the instruction tells them apart. Scans,
photos and series of the test splits never occur in the training splits. Drawings and flags are the same in
both splits, in other pictures.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from cram.streams.made import BuiltinTask, Drawn, Generator
from cram.streams.real.charts import draw_chart, draw_window
from cram.streams.real.chosen import GROUNDS
from cram.streams.real.compose import (
    CARDS,
    PLACES,
    SIZE,
    Look,
    blank_card,
    crop,
    draw_light,
    lit,
    place,
)
from cram.streams.real.flag_colors import clear_regions
from cram.streams.real.questions import FORMATS, ask, ask_options, number_words
from cram.streams.real.sheets import load_set

_OPTIONS = 4


@dataclass(frozen=True)
class Animal:
    """What a picture of an animal shows."""

    name: str
    large: bool
    place: str
    card: str

    @property
    def caption(self) -> str:
        """The picture in one sentence."""
        article = "an" if self.card[0] in "aeiou" else "a"
        size = "large" if self.large else "small"
        return f"a {size} {self.name} {self.place} {article} {self.card} card."


def _one(rng: np.random.Generator, names: list[str] | tuple[str, ...]) -> str:
    return names[int(rng.integers(len(names)))]


def _others(rng: np.random.Generator, names: list[str] | tuple[str, ...], answer: str) -> list[str]:
    left = [name for name in names if name != answer]
    return [left[i] for i in rng.permutation(len(left))[: _OPTIONS - 1]]


def draw_animal(rng: np.random.Generator, drawings: str) -> tuple[Image.Image, Animal]:
    """An animal, large or small, in one of five places on a card of one of six colours."""
    animals = load_set(drawings)
    shown = Animal(
        _one(rng, animals.names), bool(rng.integers(2)), _one(rng, list(PLACES)), _one(rng, list(CARDS))
    )
    picture = blank_card(rng, shown.card)
    width = rng.uniform(58, 66) if shown.large else rng.uniform(36, 42)
    shift = (11, 2) if shown.large else (23, 4)
    x, y = (SIZE / 2 + side * shift[0] + rng.uniform(-1, 1) * shift[1] for side in PLACES[shown.place])
    look = Look(x, y, width, rng.uniform(-12, 12), bool(rng.integers(2)), draw_light(rng, 0.8, 1.1, 0.08))
    place(picture, animals.pixels[animals.names.index(shown.name)], look)
    return picture, shown


def _animal_pick(drawings: str) -> Generator:
    def draw(rng: np.random.Generator, split: str) -> Drawn:
        del split
        picture, shown = draw_animal(rng, drawings)
        others = _others(rng, load_set(drawings).names, shown.name)
        return picture, *ask_options(rng, "animal-pick", shown.name, others)

    return draw


def _animal_caption(rng: np.random.Generator, split: str) -> Drawn:
    del split
    picture, shown = draw_animal(rng, "noto-animals")
    return picture, ask(rng, "animal-caption", "caption"), shown.caption


@lru_cache(maxsize=2)
def _scans(split: str) -> dict[str, np.ndarray]:
    """Digit -> its scans [N, 28, 28, 4] of a split."""
    digits = load_set(f"digits-{split}")
    names = np.array(digits.names)
    return {name: digits.pixels[names == name] for name in sorted(set(digits.names))}


def draw_number(rng: np.random.Generator, split: str) -> tuple[Image.Image, int]:
    """A number from 10 to 99 as two scans side by side, light on dark."""
    number = int(rng.integers(10, 100))
    ground, ink = rng.integers(0, 36, size=3), rng.integers(205, 256, size=3)
    share = np.zeros((SIZE, SIZE, 1))
    for digit, middle in zip(str(number), (27, 69), strict=True):
        scans = _scans(split)[digit]
        scan = Image.fromarray(scans[int(rng.integers(len(scans)))][..., 0])
        edge = int(rng.integers(42, 53))
        centre = (middle + rng.uniform(-3, 3), SIZE / 2 + rng.uniform(-10, 10))
        mask = Image.new("L", (SIZE, SIZE))
        mask.paste(
            scan.resize((edge, edge), Image.Resampling.BICUBIC),
            (round(centre[0] - edge / 2), round(centre[1] - edge / 2)),
        )
        share = np.maximum(share, np.asarray(mask)[..., None] / 255)
    return Image.fromarray((ground * (1 - share) + ink * share).astype(np.uint8)), number


def _digit_read(rng: np.random.Generator, split: str) -> Drawn:
    picture, number = draw_number(rng, split)
    return picture, ask(rng, "digit-read", "number"), str(number)


def _digit_pick(rng: np.random.Generator, split: str) -> Drawn:
    """Wrong options share a digit with the number, so both digits must be read."""
    picture, number = draw_number(rng, split)
    tens, unit = divmod(number, 10)
    near = [10 * tens + other for other in range(10) if other != unit]
    near += [10 * other + unit for other in range(1, 10) if other != tens]
    others = [number_words(near[i]) for i in rng.permutation(len(near))[: _OPTIONS - 1]]
    return picture, *ask_options(rng, "digit-pick", number_words(number), others)


@lru_cache(maxsize=1)
def flag_names() -> tuple[str, ...]:
    """The flags of both flag tasks: those with a region of one clear colour."""
    return tuple(name for name, regions in clear_regions().items() if regions)


def draw_flag(rng: np.random.Generator) -> tuple[Image.Image, str]:
    """A flag on a card, a little turned and moved."""
    flags, name = load_set("flags"), _one(rng, flag_names())
    picture = blank_card(rng, _one(rng, list(CARDS)))
    x, y = SIZE / 2 + rng.uniform(-9, 9, size=2)
    look = Look(x, y, rng.uniform(58, 78), rng.uniform(-10, 10), light=draw_light(rng, 0.85, 1.05, 0.03))
    place(picture, flags.pixels[flags.names.index(name)], look)
    return picture, name


def _flag_pick(rng: np.random.Generator, split: str) -> Drawn:
    del split
    picture, name = draw_flag(rng)
    return picture, *ask_options(rng, "flag-pick", name, _others(rng, flag_names(), name))


def _flag_colour(rng: np.random.Generator, split: str) -> Drawn:
    del split
    picture, name = draw_flag(rng)
    regions = clear_regions()[name]
    region = _one(rng, list(regions))
    return picture, ask(rng, "flag-colour", "word", region=region), regions[region]


def _food_count(rng: np.random.Generator, split: str) -> Drawn:
    """One to six foods of one or two kinds, each in a cell of its own."""
    surfaces, foods = load_set(f"surfaces-{split}"), load_set("twemoji-foods")
    picture = crop(rng, surfaces.pixels[surfaces.names.index(_one(rng, GROUNDS))], 120, 200)
    picture = Image.fromarray(lit(np.asarray(picture), draw_light(rng, 0.7, 1.2, 0.15)))
    count, kinds = int(rng.integers(1, 7)), rng.integers(len(foods), size=2)
    for cell in rng.permutation(6)[:count]:
        x, y = 17 + 31 * (cell % 3) + rng.uniform(-1, 1), 26 + 44 * (cell // 3) + rng.uniform(-5, 5)
        look = Look(x, y, rng.uniform(21, 26), rng.uniform(-15, 15), light=draw_light(rng, 0.85, 1.1, 0.05))
        place(picture, foods.pixels[int(kinds[int(rng.integers(2))])], look)
    return picture, ask(rng, "food-count", "number"), str(count)


def _surface_word(rng: np.random.Generator, split: str) -> Drawn:
    surfaces = load_set(f"surfaces-{split}")
    name = _one(rng, surfaces.names)
    picture = crop(rng, surfaces.pixels[surfaces.names.index(name)], 110, 180)
    return picture, ask(rng, "surface-word", "word"), name


def _chart_value(rng: np.random.Generator, split: str) -> Drawn:
    window = draw_window(rng, split)
    answer = str(window.values[window.marked])
    return draw_chart(rng, window), ask(rng, "chart-value", "number", title=window.title), answer


def _task(name: str, draw: Callable[[np.random.Generator, str], Drawn], form: str) -> BuiltinTask:
    _, scorer, max_new_tokens = FORMATS[form]
    return BuiltinTask(zlib.crc32(f"real {name}".encode()), name, draw, scorer, max_new_tokens)


TASKS: tuple[BuiltinTask, ...] = (
    _task("animal-pick", _animal_pick("noto-animals"), "letter"),
    _task("digit-read", _digit_read, "number"),
    _task("flag-pick", _flag_pick, "letter"),
    _task("food-count", _food_count, "number"),
    _task("animal-caption", _animal_caption, "caption"),
    _task("animal-pick-2", _animal_pick("twemoji-animals"), "letter"),
    _task("surface-word", _surface_word, "word"),
    _task("flag-colour", _flag_colour, "word"),
    _task("digit-pick", _digit_pick, "letter"),
    _task("chart-value", _chart_value, "number"),
)
