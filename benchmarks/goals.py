"""The goals for the figures, as data. They become a table in the report and are never a test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any

from cram_kernels.dispatch import AUTO

Cell = dict[str, Any]
Measure = Callable[[Cell, str], float | None]


@dataclass(frozen=True)
class Goal:
    """A bound on a measure over all cells that match.

    Attributes:
        text: The goal in words.
        device: "cpu" or "cuda".
        where: Field of the case -> the values it may have.
        measure: (cell, the package's candidate in the cell) -> figure, or None if a figure is missing.
        bound: The largest allowed figure for the units "%", "x" and "us"; the smallest for "less".
        unit: The unit shown.
    """

    text: str
    device: str
    where: dict[str, tuple[Any, ...]]
    measure: Measure
    bound: float
    unit: str


@dataclass(frozen=True)
class Checked:
    """A goal with the worst figure found, ready to print."""

    text: str
    wanted: str
    found: str
    where: str
    holds: bool


def _time(cell: Cell, name: str) -> float | None:
    return cell["rows"].get(name, {}).get("median_us")


def _of(function: Callable[[float, float], float], other: str) -> Measure:
    def measure(cell: Cell, ours: str) -> float | None:
        times = _time(cell, ours), _time(cell, other)
        return None if times[0] is None or times[1] is None else function(times[0], times[1])

    return measure


def _less_added(other: str) -> Measure:
    """Time that another candidate adds to the base, divided by the time that this package adds.

    Added times count as at least 1 % of the base. Infinite if the package adds nothing: then its layer with
    experts is as fast as torch's linear alone.
    """

    def measure(cell: Cell, ours: str) -> float | None:
        mine, theirs, base = _time(cell, ours), _time(cell, other), _time(cell, "base")
        if mine is None or theirs is None or base is None:
            return None
        return inf if mine <= base else (theirs - base) / max(mine - base, 0.01 * base)

    return measure


def _floor_share(cell: Cell, ours: str) -> float | None:
    row = cell["rows"].get(ours, {})
    return row["floor_us"] / row["median_us"] if "median_us" in row else None


SHARE, RATIO = _of(lambda a, b: a / b - 1, "base"), _of(lambda a, b: a / b, "base")
EXTRA_US = _of(lambda a, b: a - b, "base")
LAYER = ("forward", "routed", "train", "decode")
_7B = {"model": ("LLaVA-1.5-7B",), "projection": ("q",), "stream": ("trigap",), "dtype": ("bfloat16",)}

GOALS = [
    Goal(
        "decode adds little at D 2048",
        "cpu",
        {"op": ("decode",), "model": ("Qwen3-VL-2B",)},
        SHARE,
        0.15,
        "%",
    ),
    Goal(
        "decode adds little at D 4096",
        "cpu",
        {"op": ("decode",), "model": ("LLaVA-1.5-7B",)},
        SHARE,
        0.10,
        "%",
    ),
    Goal(
        "training step over the base's, T 1024",
        "cpu",
        {"op": ("train",), "tokens": (1024,)},
        RATIO,
        1.15,
        "x",
    ),
    Goal("no slower than PEFT rank 9", "cpu", {"op": LAYER}, _of(lambda a, b: a / b, "peft-9"), 1.0, "x"),
    Goal(
        "adds less than the released loop, T to 64",
        "cpu",
        {"op": LAYER, "tokens": (1, 8, 16, 64)},
        _less_added("released"),
        4,
        "less",
    ),
    Goal(
        "adds less than the released loop, T 1024",
        "cpu",
        {"op": LAYER, "tokens": (1024,)},
        _less_added("released"),
        3,
        "less",
    ),
    Goal(
        "forward with routing adds little",
        "cuda",
        {**_7B, "op": ("routed",), "tokens": (8192,)},
        SHARE,
        0.10,
        "%",
    ),
    Goal(
        "training step over the base's",
        "cuda",
        {**_7B, "op": ("train",), "tokens": (8192,)},
        RATIO,
        1.25,
        "x",
    ),
    Goal(
        "decode at T 16 adds little", "cuda", {**_7B, "op": ("decode",), "tokens": (16,)}, EXTRA_US, 6.0, "us"
    ),
    Goal("adds less than the released loop", "cuda", {"op": LAYER}, _less_added("released"), 8, "less"),
    Goal("adds less than PEFT of the same rank", "cuda", {"op": LAYER}, _less_added("peft"), 1.5, "less"),
    Goal("no slower than packed eager", "cuda", {"op": LAYER}, _of(lambda a, b: a / b, "packed"), 1.0, "x"),
    Goal(
        "SHRINK and EXPAND near copy bandwidth",
        "cuda",
        {"op": ("shrink", "expand"), "stream": ("trigap",), "tokens": (4096, 8192)},
        _floor_share,
        0.8,
        "share",
    ),
]


def checked(results: dict[str, Any]) -> list[Checked]:
    """Return the goals of the run's device that have figures, each with its worst cell."""
    device = results["environment"]["device"]
    found = []
    for goal in GOALS:
        measured = [
            (value, cell)
            for cell in results["cases"]
            if goal.device == device and cell["rows"] and _matches(cell["case"], goal.where)
            if (value := goal.measure(cell, ours(cell, device))) is not None
        ]
        if measured:
            found.append(_check(goal, measured))
    return found


def _matches(case: dict[str, Any], where: dict[str, tuple[Any, ...]]) -> bool:
    return case["model"] != "toy" and all(case[field] in values for field, values in where.items())


def _check(goal: Goal, measured: list[tuple[float, Cell]]) -> Checked:
    at_least = goal.unit in ("less", "share")
    value, cell = (min if at_least else max)(measured, key=lambda pair: pair[0])
    show = {
        "%": lambda v: f"{v:.1%}",
        "share": lambda v: f"{v:.0%}",
        "us": lambda v: f"{v:.1f} µs",
        "x": lambda v: f"{v:.2f} x",
        "less": lambda v: f"{v:.1f} x less" if v < inf else "nothing added",
    }[goal.unit]
    holds = value >= goal.bound if at_least else value <= goal.bound
    wanted = f"at {'least' if at_least else 'most'} {show(goal.bound)}"
    return Checked(goal.text, wanted, show(value), f"{cell['name']} ({len(measured)} cells)", holds)


def ours(cell: Cell, device: str) -> str:
    """Return the candidate that `impl="auto"` takes in a cell. For single products: the package's kernel."""
    if "triton" in cell["rows"]:
        return "triton"
    names = (f"cram {impl}" for impl in AUTO[device])
    return next((name for name in names if "median_us" in cell["rows"].get(name, {})), "")
