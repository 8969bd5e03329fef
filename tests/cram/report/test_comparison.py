"""What a comparison shows: places, the Markdown table, and the pictures of many methods."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cram.report import comparison_plots, plots
from cram.report.columns import COLUMNS, best_value, in_order, ranks, shown_columns
from cram.report.schema import validate_report
from cram.report.summary import MethodSummary, summarise
from cram.report.table import write_table
from cram.scoring.continual import continual_metrics
from tests.cram.report.pages import Page, write
from tests.cram.report.reports import ENTRIES, comparison, single_seed


@pytest.fixture(scope="module")
def methods() -> list[MethodSummary]:
    """The made-up comparison, in the report's order."""
    return summarise(validate_report(comparison()))


def test_those_told_the_task_and_ablations_have_no_place(methods: list[MethodSummary]) -> None:
    assert ranks(methods) == {"cram": 1, "alpha": 2, "beta": 3, "gamma": 4, "sequential": 5}
    shuffled = [methods[i] for i in (7, 4, 5, 3, 0, 6, 2, 1)]
    names = [method.name for method in in_order(shuffled)]
    assert names == [
        *("cram", "alpha", "beta", "gamma", "sequential", "isolated"),
        *("cram: odd", ENTRIES[6]),
    ]


def test_the_best_is_not_one_that_is_told_the_task() -> None:
    report = comparison()
    for seed in report["seeds"].values():
        seed["isolated"]["last"] = 100.0
        seed["cram: odd"]["last"] = 101.0
    found = summarise(validate_report(report))
    last, forgetting = COLUMNS[0], COLUMNS[4]
    assert best_value(found, last) == pytest.approx(found[0].metrics["last"].mean, abs=0.005)
    assert best_value(found, forgetting) == 0.0, "less is better"
    assert best_value(found[:1], last) is None, "nothing to be better than"


def test_a_report_without_a_comparison_has_fewer_columns() -> None:
    plain = summarise(validate_report(single_seed()))
    labels = [column.label for column in shown_columns(plain)]
    assert "Last (%)" in labels and "Stored" not in labels and "Added inference (%)" not in labels
    assert [method.told_task for method in plain] == [False, False, True]


def test_the_table_says_numbers_spreads_and_definitions(tmp_path: Path) -> None:
    text = write_table(tmp_path, validate_report(comparison())).read_text(encoding="utf-8")
    rows = {line.split(" | ")[1]: line for line in text.splitlines() if line.startswith("| ")}
    assert rows["cram"].startswith("| 1 | cram | 93.17 ± 0.71 | ")
    assert rows["isolated"].startswith("| – | isolated | ") and rows["cram: odd"].startswith("| – | ")
    assert rows["alpha"].split(" | ")[7:11] == ["2 K", "3 K", "5.00", "180"]
    assert rows["cram"].split(" | ")[10] == "–"
    assert rows["alpha"].split(" | ")[11] == "1,250"
    assert rows["alpha"].endswith("| 2 | 20 ± 14 |"), "prefills, then 10 % and 30 %"
    for column in COLUMNS:
        assert f"- {column.definition}" in text
    assert "# toy: 3 tasks, 2 seeds (mean ± sample standard deviation)" in text
    assert "model toy, jobs 2, max_steps 40, batch_size 16" in text and "clip" not in text
    assert "- No place: isolated, told the task at test time." in text
    assert "- **cram: no penalty**: About cram: no penalty." in text


def test_many_methods_share_axes_and_ablations_have_their_own_picture(tmp_path: Path) -> None:
    page = write(tmp_path, comparison())
    names = {"ageing", "tradeoff", "ablations", "matrices"}
    assert {file.stem for file in tmp_path.glob("*.png")} == names
    words = " ".join(page.text.split())
    assert "Ablations have no place." in words and "About cram: odd." in words
    assert isinstance(page, Page) and "Added inference" in words


def test_the_paths_end_in_the_metrics(methods: list[MethodSummary]) -> None:
    for method in methods:
        learnt = comparison_plots.learnt_so_far(method.matrices)
        fallen = comparison_plots.forgotten_so_far(method.matrices)
        assert learnt[:, -1].mean() == pytest.approx(method.metrics["last"].mean)
        assert learnt.mean() == pytest.approx(method.metrics["avg"].mean)
        assert fallen[:, -1].mean() == pytest.approx(method.metrics["forgetting"].mean)
        shorter = [list(row[: t + 1]) for t, row in enumerate(method.matrices[0][:2])]
        assert fallen[0, 1] == pytest.approx(continual_metrics(shorter).forgetting)


def test_names_beside_lines_and_points_do_not_overlap() -> None:
    report = comparison()
    for seed in report["seeds"].values():
        for method in seed.values():
            method.update(seed["cram"] | {"entry": method["entry"]})
    figures = plots.draw_all(summarise(validate_report(report)))
    for name in ("ageing", "tradeoff"):
        figure = figures[name]
        figure.canvas.draw()
        for axes in figure.axes:
            boxes = [text.get_window_extent() for text in axes.texts]
            assert len(boxes) == 6
            for i, box in enumerate(boxes):
                assert not any(box.shrunk(0.9, 0.8).overlaps(other.shrunk(0.9, 0.8)) for other in boxes[:i])


def test_ablations_are_compared_seed_by_seed(methods: list[MethodSummary]) -> None:
    figure = plots.draw_all(methods)["ablations"]
    left = figure.axes[0]
    widths = [bar.get_width() for bar in left.patches]
    # 5 points a place, and 10 on one of three tasks; the same in both seeds.
    assert widths == pytest.approx([-30 - 10 / 3, -35 - 10 / 3])
    assert [label.get_text() for label in left.get_yticklabels()] == ENTRIES[6:]
    assert np.ptp([text.get_position()[0] for text in left.texts]) == pytest.approx(5.0)


def test_backticks_in_a_note_become_code_and_markup_stays_text(tmp_path: Path) -> None:
    report = comparison()
    report["seeds"]["0"]["cram"]["entry"]["note"] = "one LoRA of `rank` rows, <b>bold</b>"
    report["seeds"]["1"]["cram"]["entry"]["note"] = "one LoRA of `rank` rows, <b>bold</b>"
    page = write(tmp_path, report)
    assert "one LoRA of rank rows, <b>bold</b>" in page.text
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<code>rank</code> rows, &lt;b&gt;bold" in html


def test_a_search_may_leave_a_field_as_it_is_for_all(tmp_path: Path) -> None:
    report = comparison(1)
    report["settings"] |= {
        "config": {**report["settings"]["config"], "learning_rate": 3e-3, "rank_max": 9},
        "found": {"alpha": {"rank_max": 18}},
    }
    assert "| alpha | 0.003 | 18 |" in write_table(tmp_path, validate_report(report)).read_text()
