"""Boxes in answers: "[x1, y1, x2, y2]", right if the overlap with the true box is above one half."""

from __future__ import annotations

import re

OVERLAP = 0.5
Box = tuple[float, float, float, float]
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?")


def read_box(text: str) -> Box | None:
    """Return the box of a text that holds exactly four numbers, else None."""
    found = [float(number) for number in _NUMBER.findall(text)]
    return (found[0], found[1], found[2], found[3]) if len(found) == 4 else None


def read_box_cut(text: str) -> Box | None:
    """Return the box as the legacy evaluator reads it; None where it cannot.

    It drops the brackets and then the first and the last character, which damages two of the coordinates.
    """
    parts = text.replace("[", "").replace("]", "")[1:-1].split(",")
    try:
        found = [float(part) for part in parts]
    except ValueError:
        return None
    return (found[0], found[1], found[2], found[3]) if len(found) == 4 else None


def overlap(left: Box, right: Box) -> float:
    """Return intersection over union of two boxes, 0 where both are empty."""
    width = max(0.0, min(left[2], right[2]) - max(left[0], right[0]))
    height = max(0.0, min(left[3], right[3]) - max(left[1], right[1]))
    union = _area(left) + _area(right) - width * height
    return width * height / union if union > 0 else 0.0


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
