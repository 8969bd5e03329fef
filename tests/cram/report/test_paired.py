"""Comparisons whose seeds learn the tasks in several orders, and the differences to CRAM seed by seed."""

from __future__ import annotations

import math

import pytest

from cram.report import plots
from cram.report.comparison_plots import learnt_so_far
from cram.report.paired import differences
from cram.report.schema import validate_report
from cram.report.summary import summarise
from cram.scoring.continual import continual_metrics
from tests.cram.report.reports import comparison, several_seeds


def test_differences_are_taken_seed_by_seed() -> None:
    report = comparison(seeds=3)
    others = [name for name in report["seeds"]["0"] if name != "cram"]
    # As far from CRAM in all seeds, but for one: 1, 2 and 6 points above it.
    for seed, shift in (("0", 1.0), ("1", 2.0), ("2", 6.0)):
        methods = report["seeds"][seed]
        methods[others[0]]["last"] = methods["cram"]["last"] + shift
    found = {each.name: each for each in differences(validate_report(report))}
    assert list(found) == others
    assert found[others[0]].last.mean == pytest.approx(3.0)
    assert found[others[0]].last.std == pytest.approx(math.sqrt(7.0))
    assert found[others[0]].error == pytest.approx(math.sqrt(7.0 / 3))
    assert (found[others[0]].ahead, found[others[0]].seeds) == (3, 3)
    assert found[others[1]].error == pytest.approx(0.0, abs=1e-9) and found[others[1]].ahead == 0


def test_one_seed_has_no_differences() -> None:
    assert differences(validate_report(comparison(seeds=1))) == []


def test_a_matrix_is_a_mean_over_one_order_and_a_metric_over_all() -> None:
    report = several_seeds()
    for method in report["seeds"]["2"].values():
        method["tasks"] = method["tasks"][::-1]
    summary = summarise(validate_report(report))[0]
    kept = [report["seeds"][seed]["cram"] for seed in ("0", "1")]
    assert len(summary.matrices) == 3
    assert summary.matrix[0, 0] == pytest.approx(sum(run["matrix"][0][0] for run in kept) / 2)
    lasts = [methods["cram"]["last"] for methods in report["seeds"].values()]
    assert summary.metrics["last"].mean == pytest.approx(sum(lasts) / 3)


def test_other_tasks_are_refused() -> None:
    report = several_seeds()
    for method in report["seeds"]["1"].values():
        name = method["tasks"][0]
        method["tasks"][0] = "other"
        for part in ("parameters", "seconds"):
            method[part]["per_task"]["other"] = method[part]["per_task"].pop(name)
        for part in ("ranks", "groups", "routing"):
            method.pop(part, None)
    with pytest.raises(ValueError, match="same methods and tasks"):
        validate_report(report)


def test_pictures_over_the_stream_are_means_over_the_seeds_of_all_orders() -> None:
    """Last falls by 1, 2 and 9 points without an idea; the second seed has an order of its own."""
    report = comparison(seeds=3)
    ablation = next(name for name in report["seeds"]["0"] if name.startswith("cram:"))
    for seed, less in (("0", 1.0), ("1", 2.0), ("2", 9.0)):
        whole = report["seeds"][seed]["cram"]
        rows = [[value - less for value in row] for row in whole["matrix"]]
        report["seeds"][seed][ablation].update(matrix=rows, **continual_metrics(rows).to_dict())
    for method in report["seeds"]["1"].values():
        method["tasks"] = method["tasks"][::-1]
    shown = [m for m in summarise(validate_report(report)) if m.name in ("cram", ablation)]
    figures = plots.draw_all(shown)
    bars = figures["ablations"].axes[0].patches
    assert [bar.get_width() for bar in bars] == pytest.approx([-4.0])
    whole, other = (learnt_so_far(m.matrices).mean(axis=0) for m in shown)
    assert whole - other == pytest.approx([4.0, 4.0, 4.0])
