"""What the drawn parts of real pictures show: charts, cards, and the names of flags' colours."""

from __future__ import annotations

import numpy as np
import pytest

from cram.streams.real import charts
from cram.streams.real.charts import HIGHEST, Window, draw_chart, draw_window
from cram.streams.real.compose import CARDS, SIZE, blank_card
from cram.streams.real.flag_colors import COLORS, color_names

LEFT, RIGHT, TOP, BOTTOM = charts._LEFT, charts._RIGHT, charts._TOP, charts._BOTTOM


def level(value: int) -> int:
    """The row of a value in a chart."""
    return round(BOTTOM - value * (BOTTOM - TOP) / HIGHEST)


def test_a_chart_has_a_line_for_each_value_and_a_label_for_every_third() -> None:
    """Low bars leave the lines free; a line is darker than the paper around it, and a label darker still."""
    pixels = np.asarray(draw_chart(np.random.default_rng(0), Window("low", (1, 1, 1, 1), 2)).convert("L"))
    paper = int(pixels[2, RIGHT])
    for value in range(2, HIGHEST + 1):
        row = level(value)
        right = pixels[row - 1 : row + 2, RIGHT - 6]
        assert right.min() < paper - 4, f"no line at {value}"
        label = pixels[row - 2 : row + 3, :LEFT]
        assert (label.min() < 140) == (value % 3 == 0), value
        between = pixels[row + 4 : row + 6, RIGHT - 6]
        assert (between == paper).all(), f"something below {value}"
    darker = [int(pixels[level(v) - 1 : level(v) + 2, RIGHT - 6].min()) for v in (3, 4)]
    assert darker[0] < darker[1], "lines with a label are the darker ones"


def test_bars_are_as_high_as_their_values_and_one_is_coloured() -> None:
    window = Window("some", (2, 9, 5, 7), 1)
    pixels = np.asarray(draw_chart(np.random.default_rng(1), window)).astype(int)
    room = (RIGHT - LEFT - 2) / 4
    for place, value in enumerate(window.values):
        column = pixels[:, round(LEFT + 2 + room * (place + 0.5))]
        colour = column[BOTTOM - 4]
        assert (np.ptp(colour) > 40) == (place == window.marked)
        top = next(row for row in range(SIZE) if np.abs(column[row] - colour).max() < 3)
        assert abs(top - level(value)) <= 1


@pytest.mark.parametrize("split", ["train", "test"])
def test_windows_hold_their_marked_value_anywhere(split: str) -> None:
    """Every value is marked about equally often, at the first and at the last place of a window as well."""
    rng = np.random.default_rng(2)
    windows = [draw_window(rng, split) for _ in range(600)]
    values = [window.values[window.marked] for window in windows]
    assert {4, 5, 6} == {len(window.values) for window in windows}
    assert min(values.count(value) for value in range(1, HIGHEST + 1)) > 600 / HIGHEST / 2
    for length in (4, 5, 6):
        marks = {window.marked for window in windows if len(window.values) == length}
        assert marks == set(range(length))


def test_a_card_is_lit_from_its_drawn_top_to_its_drawn_bottom() -> None:
    name = next(iter(CARDS))
    card = np.asarray(blank_card(np.random.default_rng(5), name))
    numbers = np.random.default_rng(5)
    base = np.asarray(CARDS[name]) + numbers.integers(-8, 9, size=3)
    top, bottom = numbers.uniform(-12, 12, size=2)
    for row, light in ((0, top), (SIZE - 1, bottom)):
        assert np.abs(card[row, 0] - np.clip(base + light, 0, 255)).max() <= 1
    assert (card == card[:, :1]).all()


@pytest.mark.parametrize(
    ("pixel", "name"),
    [
        ((210, 20, 30), "red"),
        ((206, 17, 60), "red"),
        ((240, 130, 20), "orange"),
        ((250, 210, 10), "yellow"),
        ((0, 150, 60), "green"),
        ((120, 200, 40), "green"),
        ((20, 60, 180), "blue"),
        ((100, 170, 230), "blue"),
        ((250, 250, 250), "white"),
        ((10, 10, 10), "black"),
        # Both sides of each hue's edge: 16, 40, 66, 170, 262 and 335 degrees.
        ((255, 67, 0), "red"),
        ((255, 69, 0), "orange"),
        ((255, 169, 0), "orange"),
        ((255, 171, 0), "yellow"),
        ((232, 255, 0), "yellow"),
        ((229, 255, 0), "green"),
        ((0, 255, 212), "green"),
        ((0, 255, 213), "blue"),
        ((93, 0, 255), "blue"),
        ((94, 0, 255), None),
        ((255, 0, 107), None),
        ((255, 0, 106), "red"),
        ((150, 30, 150), None),
        ((120, 120, 120), None),
    ],
)
def test_plain_colours_have_their_names(pixel: tuple[int, int, int], name: str | None) -> None:
    (found,) = color_names(np.array([pixel], np.uint8))
    assert found == (-1 if name is None else COLORS.index(name))
