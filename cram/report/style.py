"""Colours and fonts of all pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.colors import LinearSegmentedColormap

INK, QUIET, HAIRLINE = "#1f2933", "#6b7785", "#d5dbe1"
METHOD_COLOURS = {"cram": "#1d5b8f", "sequential": "#c2572b", "isolated": "#7d8793"}
OTHER_COLOURS = ("#3f8f5b", "#8a5a9e", "#b08a1e", "#3a9aa8", "#a04463", "#5d6b2f")
SHADES = LinearSegmentedColormap.from_list("shades", ["#f7f9fb", "#c6dbea", "#6fa4c9", "#2a6a9e", "#123f66"])
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlepad": 8.0,
    "axes.edgecolor": HAIRLINE,
    "axes.labelcolor": QUIET,
    "text.color": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "svg.fonttype": "path",
    "svg.hashsalt": "cram",
}


def method_colours(names: Sequence[str]) -> dict[str, str]:
    """Return one colour per method. Some methods have fixed colours; the others get colours in order."""
    others = iter(OTHER_COLOURS * (1 + len(names) // len(OTHER_COLOURS)))
    return {name: METHOD_COLOURS.get(name) or next(others) for name in names}
