"""What was predicted for an H200 before anything ran on one, as data: the table of NOTES.md, and what held.

A prediction names one figure of the GPU command's results and the bounds that it should keep. Beside it stand
two times that no kernel beats: bytes over the copy bandwidth (`floors.py`), and instructions of the compiled
kernels over the rate at which a multiprocessor issues them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from benchmarks import floors, goals, markdown
from benchmarks.cases import Case

# Copy bandwidth in bytes and products in FLOPs a microsecond, as measured on an H200.
H200 = floors.Ceilings(4.3e6, {"bfloat16": 790e6})
MODEL, STREAM, DTYPE = "LLaVA-1.5-7B", "trigap", "bfloat16"
FILES = ("results", "experiments", "replays", "penalty", "e2e-7b")
Found = Mapping[str, Any]


@dataclass(frozen=True)
class Prediction:
    """One figure and its bounds.

    Attributes:
        question: What it answers.
        measure: Reads the figure out of the results by file; None where it was not measured.
        least, most: The bounds; None for none.
        show: Formats a figure.
        settled_by: Where the figure comes from, for a reader.
        case: What the experts' own launches are of, where two bounds are shown.
        issue_us: Least time in which their instructions are issued: `python -m tests.benchmarks.issue` under
            Triton 3.6.0.
    """

    question: str
    measure: Callable[[Found], float | None]
    least: float | None
    most: float | None
    show: Callable[[float], str]
    settled_by: str
    case: Case | None = None
    issue_us: float | None = None

    @property
    def bytes_us(self) -> float | None:
        """Least time in which the experts' bytes are moved."""
        return None if self.case is None else H200.floor_us(floors.expert_phases(self.case), DTYPE)

    @property
    def wanted(self) -> str:
        """The bounds in words."""
        if self.least is None and self.most is not None:
            return f"at most {self.show(self.most)}"
        if self.most is None and self.least is not None:
            return f"at least {self.show(self.least)}"
        assert self.least is not None and self.most is not None
        return f"{self.show(self.least)} to {self.show(self.most)}"

    def holds(self, value: float) -> bool:
        """Whether a figure keeps the bounds."""
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)


def _percent(value: float) -> str:
    return f"{value:+.0%}"


def _share(value: float) -> str:
    return f"{value:.0%}"


def _us(value: float) -> str:
    return f"{value:.3g} µs"


def _times(value: float) -> str:
    return f"{value:.2f} x"


def _count(value: float) -> str:
    return f"{value:.0f}"


def _case(op: str, tokens: int, projection: str = "q", stream: str = STREAM) -> Case:
    segments = tokens if op == "decode" else 8 if tokens >= 1024 else 1
    return Case(op, MODEL, projection, stream, tokens, segments, DTYPE)


Combine = Callable[..., float]


def _rows(case: Case, combine: Combine, *names: str) -> Callable[[Found], float | None]:
    """Combine the medians of some candidates of a case; "ours" stands for what "auto" takes."""

    def measure(found: Found) -> float | None:
        results = found.get("results")
        cells = [] if results is None else results["cases"]
        for cell in cells:
            if cell["name"] == case.name and cell["rows"]:
                ours = goals.ours(cell, results["environment"]["device"])
                rows = [cell["rows"].get(ours if name == "ours" else name, {}) for name in names]
                times = [row.get("median_us") for row in rows]
                return None if None in times else combine(*times)
        return None

    return measure


def _ways(tokens: int, combine: Combine, *patterns: str) -> Callable[[Found], float | None]:
    """Combine the medians of ways of the experiments; of several whose names match, the fastest."""

    def measure(found: Found) -> float | None:
        rows = [row for row in found.get("experiments", {}).get("rows", ()) if row["tokens"] == tokens]
        times = []
        for pattern in patterns:
            matching = [r["median_us"] for r in rows if fnmatch(r["name"], pattern) and "median_us" in r]
            times.append(min(matching, default=None))
        return None if None in times else combine(*times)

    return measure


def _wrong_replays(found: Found) -> float | None:
    rows = found.get("replays", {}).get("rows", ())
    return float(sum(row["wrong"] for row in rows)) if rows else None


def _penalty(found: Found) -> float | None:
    times = {row["candidate"]: row["median_ms"] for row in found.get("penalty", {}).get("rows", ())}
    return times["native"] / times["byte floor"] if "native" in times else None


def _throughput(figure: str) -> Callable[[Found], float | None]:
    """The bare model's time for a figure over CRAM's."""

    def measure(found: Found) -> float | None:
        rows = found.get("e2e-7b", {}).get("rows", {})
        times = [rows.get(name, {}).get(figure) for name in ("bare", "cram")]
        return None if None in times else times[0] / times[1]

    return measure


def _added(a: float, base: float) -> float:
    return a / base - 1


def _more(a: float, base: float) -> float:
    return a - base


def _ratio(a: float, b: float) -> float:
    return a / b


def _alone(a: float) -> float:
    return a


def _layer(
    question: str,
    case: Case,
    combine: Combine,
    most: float,
    show: Callable[[float], str],
    issue: float | None,
) -> Prediction:
    measure = _rows(case, combine, "ours", "base")
    return Prediction(question, measure, None, most, show, case.name, case, issue)


def _part(
    question: str, case: Case, combine: Combine, names: tuple[str, ...], most: float, **more: Any
) -> Prediction:
    show = _us if combine is _alone else _times
    return Prediction(question, _rows(case, combine, *names), None, most, show, case.name, case, **more)


def _asked(
    question: str,
    tokens: int,
    combine: Combine,
    names: tuple[str, ...],
    bounds: tuple[float | None, float | None],
) -> Prediction:
    show = _percent if combine is _added else _times if combine is _ratio else _us
    return Prediction(question, _ways(tokens, combine, *names), *bounds, show, f"experiments, T {tokens}")


_STREAMED = "layer, W and A in one launch*"
_FIRST, _CHUNKS = "layer, base first", "layer, base first in chunks of 4096"
_STACK, _PLAIN = _case("stacked", 8192, "q+k+v"), _case("forward", 8192)
PREDICTIONS = [
    Prediction("captured decode on new inputs: wrong replays", _wrong_replays, None, 0, _count, "replays"),
    _layer("forward of one linear, T 8192, adds", _case("forward", 8192), _added, 0.14, _percent, 22.9),
    _layer("the same with routing in the call", _case("routed", 8192), _added, 0.14, _percent, 22.9),
    Prediction(
        "[x \\| U] [W \\| B] as one product, T 8192, adds",
        _rows(_PLAIN, _added, "cram triton wide", "base"),
        None,
        0.10,
        _percent,
        f"{_PLAIN.name}, wide",
        _case("shrink", 8192),
        5.5,
    ),
    _layer("training step, T 8192", _case("train", 8192), _ratio, 1.25, _times, 55.5),
    _layer("decode, T 1, adds", _case("decode", 1), _more, 6.0, _us, 0.598),
    _layer("decode, T 16, adds", _case("decode", 16), _more, 6.0, _us, 0.598),
    _layer("decode, T 64, adds", _case("decode", 64), _more, 6.0, _us, 2.39),
    _layer("prompt of 1024 tokens adds", _case("forward", 1024), _added, 0.35, _percent, 3.26),
    _layer(
        "512 packed rows, T 8192, add", _case("forward", 8192, stream="64x8"), _added, 0.35, _percent, 59.1
    ),
    _part("SHRINK, T 8192", _case("shrink", 8192), _alone, ("triton",), 21.0, issue_us=5.5),
    _part(
        "SHRINK over the library's, which starves on 78 rows",
        _case("shrink", 8192),
        _ratio,
        ("triton", "matmul"),
        1.0,
    ),
    _part("EXPAND, T 8192", _case("expand", 8192), _alone, ("triton",), 40.0, issue_us=17.4),
    _part("EXPAND over addmm_", _case("expand", 8192), _ratio, ("triton", "matmul"), 1.1),
    _part("GRAM, T 8192", _case("gram", 8192), _alone, ("triton",), 42.0, issue_us=8.5),
    _part(
        "GRAM over the library's, which starves on 4 rows",
        _case("gram", 8192),
        _ratio,
        ("triton", "matmul"),
        1.0,
    ),
    Prediction(
        "q, k, v in one call instead of three, T 8192",
        _rows(_STACK, _ratio, "cram triton stacked", "cram triton"),
        None,
        0.98,
        _times,
        _STACK.name,
        _STACK,
        71.7,
    ),
    Prediction(
        "grouped_mm over padded experts, over the loop",
        _rows(_PLAIN, _ratio, "grouped", "loop"),
        1.0,
        None,
        _times,
        f"{_PLAIN.name}, grouped",
    ),
    _asked("base product, T 8192", 8192, _alone, ("base",), (330.0, 366.0)),
    _asked("base product, T 1024", 1024, _alone, ("base",), (41.0, 50.0)),
    _asked("base product, T 16", 16, _alone, ("base",), (8.0, 11.0)),
    _asked(
        "EXPAND first, then the base with beta 1, adds", 8192, _added, ("expand, then*", "base"), (None, 0.09)
    ),
    _asked("base, then EXPAND, adds", 8192, _added, ("base, then*", "base"), (0.08, 0.12)),
    _asked(
        "the same in chunks of 4096 tokens adds", 8192, _added, ("in chunks of 4096", "base"), (None, 0.09)
    ),
    _asked("layer, base first in chunks, over base first", 8192, _ratio, (_CHUNKS, _FIRST), (None, 1.0)),
    _asked("layer, base last, over base first", 8192, _ratio, ("layer, base last", _FIRST), (None, 1.0)),
    _asked("one product, 80 deeper, adds", 8192, _added, ("one product, 80*", "base"), (None, 0.05)),
    _asked("x A^T on a second stream adds", 16, _more, ("base beside*", "base"), (None, 2.0)),
    *(
        _asked(f"W and A in one launch, over the layer, T {t}", t, _ratio, (_STREAMED, "layer"), (None, 1.0))
        for t in (1, 16, 64)
    ),
    Prediction("penalty of 128 modules over its bytes", _penalty, None, 3.0, _times, "penalty"),
    *(
        Prediction(
            f"{what} over the bare 7B model's", _throughput(figure), least, None, _share, "e2e --model 7b"
        )
        for what, figure, least in (
            ("prefill", "prompt_us", 0.83),
            ("decode", "token_us", 0.89),
            ("decode in a graph", "captured_us", 0.89),
        )
    ),
]
HEADER = ("question", "bytes, µs", "issue, µs", "prediction", "settled by")


def table() -> list[str]:
    """Return the Markdown table of all predictions."""

    def bound(us: float | None) -> str:
        return "" if us is None else f"{us:.3g}"

    rows = [
        [p.question, bound(p.bytes_us), bound(p.issue_us), p.wanted, f"`{p.settled_by}`"] for p in PREDICTIONS
    ]
    return markdown.table(HEADER, rows)


def load(folder: Path) -> dict[str, Any]:
    """Return what the programs of the GPU command left in a folder, by file, without those of a CPU."""
    files = {name: folder / f"{name}.json" for name in FILES}
    found = {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}
    return {name: each for name, each in found.items() if each["environment"]["device"] == "cuda"}


def verdicts(found: Found) -> list[str]:
    """Return one line for each prediction that was measured, and how many were not."""
    shown, open_ = [], 0
    for p in PREDICTIONS:
        value = p.measure(found)
        if value is None:
            open_ += 1
        else:
            word = "held  " if p.holds(value) else "MISSED"
            shown.append(f"{word} {p.question}: {p.show(value)}, predicted {p.wanted}")
    return [*shown, f"{open_} of {len(PREDICTIONS)} predictions have no figure"]
