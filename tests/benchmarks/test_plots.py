"""Pictures of a run: everything that is written stands inside of the picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import plots
from benchmarks.cases import LAYER_OPS, STACKED_OPS, SUITES

pytest.importorskip("matplotlib")


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Figures of the longest cases, with a long name of the processor and ratios of 0.01 to 3000."""
    figures: list[Any] = []

    def keep(figure: Any, file: Path) -> Path:
        figure.canvas.draw()
        figures.append(figure)
        return file

    monkeypatch.setattr(plots, "_save", keep)
    ratios = [0.01, 3000.0, *[1.0] * len(plots.COLOURS)]
    rows = {"base": 1e3, **{name: 1e3 * ratio for name, ratio in zip(plots.COLOURS, ratios, strict=False)}}
    longest = {case.op: case for case in sorted(SUITES["full", "cpu"], key=lambda case: len(case.name))}
    cells = [
        {"name": case.name, "case": vars(case), "rows": {n: {"median_us": t} for n, t in rows.items()}}
        for case in (longest[op] for op in (*LAYER_OPS, *STACKED_OPS))
    ]
    results = {
        "cases": cells,
        "environment": {"machine": "intel-xeon-processor-6-167-amx-2-threads-torch2.13"},
        "ceilings": {"bytes_per_us": 1e4, "flops_per_us": {"float32": 1e5, "bfloat16": 1e6}},
    }
    plots.write(tmp_path, results)
    return figures


def _texts(figure: Any) -> Iterator[Any]:
    """Titles, marks of bars, names of axes and legends; ticks beyond an axis's range are never drawn."""
    yield figure._suptitle
    for axis in figure.axes:
        yield from (*axis.texts, axis.title, axis._left_title, axis.xaxis.label, axis.yaxis.label)
        yield from () if axis.get_legend() is None else axis.get_legend().get_texts()


def test_texts_stay_inside_of_the_picture(drawn: list[Any]) -> None:
    assert len(drawn) == 2
    for figure in drawn:
        whole = figure.bbox
        for text in filter(lambda each: each.get_text(), _texts(figure)):
            box = text.get_window_extent()
            assert whole.x0 <= box.x0 and box.x1 <= whole.x1, text.get_text()
            assert whole.y0 <= box.y0 and box.y1 <= whole.y1, text.get_text()


def test_every_panel_has_its_scale(drawn: list[Any]) -> None:
    panels = [axis for axis in drawn[0].axes if axis.axison]
    assert panels and all(any(t.get_text() == "5" for t in axis.get_xticklabels()) for axis in panels)
    assert all(axis.xaxis.get_tick_params()["labelbottom"] for axis in panels)
