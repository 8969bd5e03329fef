"""The conclusion of a report in one sentence, and the descriptions of its pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cram.report import plots
from cram.report.schema import validate_report
from cram.report.summary import summarise
from cram.report.words import conclusion, description
from tests.cram.report.reports import MATRICES, comparison, several_seeds, single_seed


def said(report: dict[str, Any], base: dict[str, float] | None = None) -> str:
    return conclusion(summarise(validate_report(report)), base)


def test_one_method_alone() -> None:
    report = {"stream": "toy", "methods": {"cram": single_seed()["methods"]["cram"]}}
    expected = (
        "After the last task, cram scores 90.0 % on average over all 3 tasks, and has forgotten 3.0 points"
    )
    assert said(report) == f"{expected}."
    base = {"a": 10.0, "b": 20.0, "c": 60.0}
    assert said(report, base) == f"{expected}; the untrained base scores 30.0 %."


def test_the_best_method_beside_the_next_one() -> None:
    assert said(single_seed()) == (
        "After the last task, cram scores 90.0 % on average over all 3 tasks, more than the other method "
        "(sequential: 44.7 %), and has forgotten 3.0 points (sequential: 71.0)."
    )
    assert "more than every other method (alpha: " in said(comparison())


def test_the_sentence_is_about_the_best_method_whatever_its_name() -> None:
    report = single_seed()
    methods = report["methods"]
    methods["cram"], methods["sequential"] = methods["sequential"], methods["cram"]
    assert said(report).startswith("After the last task, sequential scores 90.0 %")
    report = single_seed()
    report["methods"]["sequential"] = report["methods"]["cram"]
    assert "as much as the other method (sequential: 90.0 %)" in said(report)


def test_a_single_task_has_nothing_to_forget() -> None:
    report = single_seed()
    method = report["methods"]["cram"] | {"tasks": ["a"], "matrix": [[90.0]]}
    for key in ("parameters", "seconds"):
        method[key] = {**method[key], "per_task": {"a": 1}}
    kept = {key: value for key, value in method.items() if key not in ("ranks", "groups", "routing")}
    assert "over its only task." in said({"stream": "toy", "methods": {"cram": kept}})


@pytest.mark.parametrize("made", [single_seed, several_seeds, comparison])
def test_every_picture_has_a_description_with_numbers(made: Callable[[], dict[str, Any]]) -> None:
    methods = summarise(validate_report(made()))
    texts = {name: description(name, methods) for name in plots.draw_all(methods)}
    assert len(set(texts.values())) == len(texts)
    assert all(any(letter.isdigit() for letter in text) for text in texts.values()), texts


def test_descriptions_say_what_is_drawn() -> None:
    methods = summarise(validate_report(single_seed()))
    bottom = ", ".join(f"{value:.0f}" for value in MATRICES["sequential"][-1])
    assert f"sequential {bottom}" in description("matrices", methods)
    assert "k_proj: mean 7.0, from 5 to 9" in description("ranks_cram", methods)
    routed = description("routing_cram", methods)
    assert "count: 99 % in the right group, 81 % with the right expert first, entropy of" in routed
    assert "gates 0.42;" in routed
