"""The sibling tasks of `builtin-real`: its answer formats on other pictures.

A maker draws one picture and returns what can be asked about it: questions in all formats whose answers the
picture holds. No maker reads a picture set of the stream.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from cram.base.real.pictures import (
    COLORS,
    PATTERNS,
    REGIONS,
    RNG,
    Drawing,
    bars,
    color_of,
    digit,
    drawings,
    ground,
    paste,
    pattern,
    pick,
    shade,
    surface,
)
from cram.base.real.tower import SIZE
from cram.base.real.wordings import list_options
from cram.streams.real.sheets import load_set, load_tables, set_names

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEENS = (
    "ten", "eleven", "twelve", "thirteen", "fourteen",
    "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


@dataclass(frozen=True)
class Ask:
    """A question in a format of `wordings.FORMATS`, with options for letters."""

    form: str
    question: str
    answer: str
    options: tuple[str, ...] = ()


Made = tuple[Image.Image | None, list[Ask]]
Maker = Callable[[RNG], Made]


def a(name: str) -> str:
    """The name with its article."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def choose(rng: RNG, question: str, answer: str, others: list[str] | tuple[str, ...]) -> Ask:
    """A letter question: the answer among three others, in random order."""
    wrong = [name for name in dict.fromkeys(others) if name != answer]
    names = [answer, *(wrong[i] for i in rng.permutation(len(wrong))[:3])]
    names = [names[i] for i in rng.permutation(len(names))]
    return Ask("letter", question, "ABCDEFGH"[names.index(answer)], tuple(names))


def check(rng: RNG, question: str, right: str, others: list[str] | tuple[str, ...]) -> Ask:
    """A yes-no question about the right name or about another; `question` has a place for the name."""
    true = rng.random() < 0.5
    wrong = [name for name in others if name != right]
    return Ask("yesno", question.format(right if true else pick(rng, wrong)), "yes" if true else "no")


def number_words(value: int) -> str:
    """A number below 100 in words, such as "forty-two"."""
    if value < 20:
        return (*NUMBER_WORDS, *TEENS)[value]
    tens, unit = TENS[value // 10 - 2], value % 10
    return f"{tens}-{NUMBER_WORDS[unit]}" if unit else tens


def _place(x: float, y: float) -> str:
    """Where a point of the picture lies, along the axis on which it is farther from the middle."""
    across, down = x - SIZE / 2, y - SIZE / 2
    if max(abs(across), abs(down)) < SIZE / 9:
        return "in the middle of"
    if abs(across) > abs(down):
        return "on the left of" if across < 0 else "on the right of"
    return "at the top of" if down < 0 else "at the bottom of"


def _draw(rng: RNG, kind: str | None = None) -> Drawing:
    source = drawings()[int(rng.choice(3, p=[0.5, 0.35, 0.15]) if kind is None else 0)]
    chosen = [each for each in source if kind in (None, each.kind)]
    return chosen[int(rng.integers(len(chosen)))]


def _names_like(drawing: Drawing) -> list[str]:
    return [each.name for source in drawings() for each in source if each.kind == drawing.kind]


@lru_cache(maxsize=1)
def any_names() -> tuple[str, ...]:
    """The names in all sets, as words: no picture is read."""
    return tuple(dict.fromkeys(name for each in set_names() for name in load_set(each).names))


def thing(rng: RNG) -> Made:
    """One drawing: its name, kind and ground."""
    drawing = _draw(rng, "animal" if rng.random() < 0.35 else None)
    picture, color = ground(rng)
    large = rng.random() < 0.5
    size = int(rng.integers(76, 108) if large else rng.integers(44, 64))
    x, y = rng.uniform(size / 2 - 4, SIZE - size / 2 + 4, 2)
    paste(rng, picture, drawing.picture, size, x, y)
    name, like = drawing.name, _names_like(drawing)
    what = pick(rng, ("Which one is shown?", "What is this?", "What does the picture show?",
                      f"Which {drawing.kind} is it?", f"Which {drawing.kind} is drawn here?"))  # fmt: skip
    asks = [
        Ask("word", what, name),
        Ask("word", what, name),
        Ask("caption", "", f"{a(name)}."),
        choose(rng, what, name, any_names()),
        choose(rng, what, name, like),
        choose(rng, what, name, like),
        check(rng, "Is this {}?", a(name), [a(other) for other in like]),
        Ask("word", "What kind of thing is it?", drawing.kind),
    ]
    if color:
        asks += [Ask("word", f"Which color is behind the {name}?", color)]
        told = f"a {'large' if large else 'small'} {name} {_place(x, y)} {a(color)} picture."
        asks += [Ask("caption", "", told)] * 3
    asks += [Ask("word", f"Where is the {name}?", _place(x, y))]
    return picture, asks


def pair(rng: RNG) -> Made:
    """Two drawings beside or above each other."""
    kind = pick(rng, ("animal", "animal", "food", "object", "place"))
    first, second = _draw(rng, kind), _draw(rng, kind)
    while second.name == first.name:
        second = _draw(rng, kind)
    picture, _ = ground(rng)
    upright = rng.random() < 0.5
    for drawing, along in ((first, 33), (second, 95)):
        x, y = along + rng.uniform(-4, 4), 64 + rng.uniform(-16, 16)
        paste(rng, picture, drawing.picture, int(rng.integers(44, 66)), *((y, x) if upright else (x, y)))
    relation = "above" if upright else "left of"
    one, other = ("at the top", "at the bottom") if upright else ("on the left", "on the right")
    return picture, [
        Ask("caption", "", f"{a(first.name)} {relation} {a(second.name)}."),
        Ask("caption", "", f"{a(first.name)} {relation} {a(second.name)}."),
        Ask("caption", "", f"{a(first.name)} {relation} {a(second.name)}."),
        Ask("word", f"What is {one}?", first.name),
        Ask("word", f"What is {other}?", second.name),
        choose(rng, f"Which one is {one}?", first.name, [second.name, *_names_like(first)]),
        check(rng, "Is {} in the picture?", a(first.name), [a(name) for name in _names_like(first)]),
        Ask("number", "How many things are there?", "2"),
    ]


def crowd(rng: RNG) -> Made:
    """One to eight copies of a drawing on any ground."""
    drawing = _draw(rng, pick(rng, ("food", "food", "object", "activity", "animal")))
    picture, _ = ground(rng)
    count = int(rng.choice(8, p=[0.14, 0.15, 0.16, 0.16, 0.15, 0.14, 0.06, 0.04])) + 1
    columns = 3 if count > 4 or rng.random() < 0.5 else 2
    cell = SIZE / columns
    for place in rng.permutation(columns * columns)[:count]:
        x, y = (place % columns + 0.5) * cell, (place // columns + 0.5) * cell
        size = int(rng.uniform(0.6, 0.95) * min(cell, 44))
        shift = rng.uniform(-1, 1, 2) * (cell - size) / 2
        paste(rng, picture, drawing.picture, size, x + shift[0], y + shift[1])
    numbers = [str(i) for i in range(1, 9)]
    many = pick(rng, (f"How many times is the {drawing.name} drawn?", "How many are there?",
                      "How many things are in the picture?", f"Count the {drawing.kind} items."))  # fmt: skip
    return picture, [
        Ask("number", many, str(count)),
        Ask("number", many, str(count)),
        Ask("number", many, str(count)),
        choose(rng, many, str(count), numbers),
        check(rng, "Are there {}?", str(count), numbers),
        Ask("word", "What is there?", drawing.name),
        Ask("word", "How many are there?", NUMBER_WORDS[count]),
    ]


def numeral(rng: RNG) -> Made:
    """One to three handwritten digits."""
    count = int(rng.choice([1, 2, 3], p=[0.35, 0.5, 0.15]))
    values = [int(value) for value in rng.integers(0, 10, count)]
    values[0] = max(1, values[0]) if count > 1 else values[0]
    ink = (255, 255, 255) if rng.random() < 0.7 else (20, 20, 20)
    paper = (0, 0, 0) if ink[0] == 255 else (245, 245, 245)
    picture = Image.new("RGB", (SIZE, SIZE), paper)
    if rng.random() < 0.4:
        color = pick(
            rng, ("blue", "green", "purple", "brown", "red") if ink[0] == 255 else ("yellow", "pink")
        )
        picture = Image.new("RGB", (SIZE, SIZE), shade(rng, color))
    pitch = min(62, 122 / count)
    edge = int(pitch * rng.uniform(0.85, 1.1)) if count > 1 else int(rng.uniform(56, 110))
    for i, value in enumerate(values):
        x = 64 + (i - (count - 1) / 2) * pitch + rng.uniform(-3, 3)
        drawn = digit(rng, value, edge, ink)
        picture.paste(drawn, (int(x - edge / 2), int(64 + rng.uniform(-12, 12) - edge / 2)), drawn)
    text = "".join(map(str, values))
    read = pick(rng, ("Which number is written here?", "Read the number.", "What number is it?"))
    asks = [Ask("number", read, text), Ask("number", read, text), Ask("number", read, text)]
    if count == 1:
        word = NUMBER_WORDS[values[0]]
        asks += [
            choose(rng, "Which digit is it?", word, NUMBER_WORDS),
            Ask("word", "Which digit is it?", word),
        ]
        asks += [choose(rng, read, text, [str(i) for i in range(10)])]
    else:
        place = int(rng.integers(2))
        where = ("first", "last")[place]
        word = NUMBER_WORDS[values[-place]]
        low, high = 10 ** (count - 1), 10**count
        others = [int(i) for i in rng.integers(low, high, 6)]
        asks += [
            choose(rng, read, text, [str(i) for i in others]),
            choose(rng, f"Which digit is {where}?", word, NUMBER_WORDS),
            Ask("word", f"Which digit is {where}?", word),
            Ask("number", f"Which digit is {where}?", str(values[-place])),
        ]
    if count == 2:
        spelled = number_words(int(text))
        words = [number_words(i) for i in others]
        asks += [
            choose(rng, read, spelled, words),
            choose(rng, read, spelled, words),
            Ask("word", read, spelled),
        ]
    return picture, asks


def flag(rng: RNG) -> Made:
    """A flag on a plain ground: a free country's with its name, or invented stripes; colours of its parts."""
    if rng.random() < 0.6:
        source = load_set("flags-free")
        index = int(rng.integers(len(source)))
        name, drawn = source.names[index], Image.fromarray(source.pixels[index])
    else:
        name, drawn = "", _stripes(rng)
    picture = Image.new("RGB", (SIZE, SIZE), shade(rng, pick(rng, ("white", "grey", "black", "blue"))))
    height = int(rng.integers(60, 88))
    width = int(height * 4 / 3)
    left, top = int(rng.integers(0, SIZE - width + 1)), int(rng.integers(0, SIZE - height + 1))
    picture.paste(drawn.resize((width, height), Image.Resampling.BILINEAR).convert("RGB"), (left, top))
    pixels = np.asarray(drawn.convert("RGB"))
    parts = {
        "at the top": pixels[:12, 12:-12],
        "at the bottom": pixels[-12:, 12:-12],
        "on the left": pixels[12:-12, :12],
        "on the right": pixels[12:-12, -12:],
        "in the middle": pixels[24:36, 32:48],
    }
    most = color_of(pixels.reshape(-1, 3)[::7])
    largest = pick(
        rng, ("Which color is most of the flag?", "Which color covers the largest part of the flag?")
    )
    part = pick(rng, tuple(parts))
    color = color_of(parts[part].reshape(-1, 3)[::3])
    asks = [
        Ask("word", largest, most),
        Ask("word", f"Which color is {part} of the flag?", color),
        Ask("word", f"Which color is {part} of the flag?", color),
        choose(rng, f"Which color is {part} of the flag?", color, tuple(COLORS)),
        check(rng, "Is the flag mostly {}?", most, tuple(COLORS)),
    ]
    if name:
        what = pick(rng, ("Whose flag is this?", "Which country has this flag?", "The flag belongs to"))
        names = (*load_set("flags-free").names, *load_set("flags").names)
        asks += [choose(rng, what, name, names) for _ in range(3)]
        asks += [Ask("word", what, name), Ask("caption", "", f"the flag of {name}.")]
    return picture, asks


def _stripes(rng: RNG) -> Image.Image:
    """An invented flag of two to four stripes, perhaps with a canton or a disc."""
    flag = Image.new("RGB", (80, 60))
    count, upright = int(rng.integers(2, 5)), rng.random() < 0.5
    for i in range(count):
        color = shade(rng, pick(rng, tuple(COLORS)))
        box = (80 * i // count, 0, 80 * (i + 1) // count, 60)
        flag.paste(color, box if upright else (0, 60 * i // count, 80, 60 * (i + 1) // count))
    if rng.random() < 0.3:
        flag.paste(shade(rng, pick(rng, tuple(COLORS))), (0, 0, 34, 30))
    return flag


def texture(rng: RNG) -> Made:
    """A square of a photo, or a drawn pattern."""
    real = rng.random() < 0.6
    names = tuple(REGIONS) if real else PATTERNS
    name = pick(rng, names)
    picture = surface(rng, name) if real else pattern(rng, name)
    what = pick(rng, ("What is seen here?", "Which surface is it?", "What does this close view show?"))
    return picture, [
        Ask("word", what, name),
        Ask("word", what, name),
        choose(rng, what, name, (*REGIONS, *PATTERNS)),
        Ask("caption", "", f"{name}."),
        check(rng, "Does it show {}?", name, names),
    ]


def chart(rng: RNG) -> Made:
    """A bar chart of three to six bars: invented values, or a run of a free table."""
    free = [series["values"] for series in load_tables() if series["split"] == "free"]
    count, highest = int(rng.integers(3, 7)), 9
    values = [int(value) for value in rng.integers(1, 10, count)]
    if rng.random() < 0.2:
        run = free[int(rng.integers(len(free)))]
        start = int(rng.integers(0, max(1, len(run) - count)))
        values = [int(value) for value in run[start : start + count]]
    one = pick(rng, tuple(COLORS)[:9])
    several = [tuple(COLORS)[i] for i in rng.permutation(9)[: len(values)]]
    colors = several if rng.random() < 0.6 else [one] * len(values)
    marked = int(rng.integers(len(values)))
    picture = bars(rng, values, colors, highest, marked)
    place = int(rng.integers(4))
    word = ("tallest", "shortest", "first", "last")[place]
    index = (int(np.argmax(values)), int(np.argmin(values)), 0, len(values) - 1)[place]
    asked = pick(rng, (f"How high is the {word} bar?", f"What value has the {word} bar?",
                       f"Read the {word} bar."))  # fmt: skip
    asks = [Ask("number", asked, str(values[index]))] * 4
    point = pick(rng, ("What value has the bar with the arrow?", "How high is the marked bar?"))
    asks += [Ask("number", point, str(values[marked]))] * 4
    asks += [choose(rng, asked, str(values[index]), [str(i) for i in range(1, 10)])]
    asks += [Ask("number", "How many bars does the chart have?", str(len(values)))]
    if colors is several:
        asks += [
            Ask("word", f"Which color has the {word} bar?", colors[index]),
            Ask("number", f"What value has the {colors[index]} bar?", str(values[index])),
            choose(rng, f"Which color has the {word} bar?", colors[index], tuple(COLORS)[:9]),
        ]
    return picture, asks


def letters(rng: RNG) -> Made:
    """Without a picture: the letter of a named option, a named option itself, and copying."""
    known = any_names()
    names = [known[i] for i in rng.permutation(len(known))[:4]]
    answer = pick(rng, names)
    named = choose(rng, f"Which option is {answer}?", answer, names)
    letter = "ABCD"[named.options.index(answer)]
    return None, [
        named,
        named,
        Ask("word", f"{list_options(list(named.options))} What is option {letter}?", answer),
        Ask("word", f"Repeat: {answer}", answer),
        check(rng, f"Is {answer} the same as {{}}?", answer, names),
    ]


# Makers and how often each draws.
MAKERS: tuple[tuple[Maker, float], ...] = (
    (thing, 3.2),
    (pair, 1.6),
    (crowd, 1.4),
    (numeral, 1.5),
    (flag, 1.2),
    (texture, 0.6),
    (chart, 1.4),
    (letters, 0.8),
)
