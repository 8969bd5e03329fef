"""`validate_report` accepts the schema and names the place of every fault."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from cram.report.schema import by_seed, validate_report
from tests.cram.report.reports import TASKS, comparison, several_seeds, single_seed

Damage = Callable[[dict[str, Any]], object]


def test_valid_reports_are_accepted_as_they_are() -> None:
    for report in (single_seed(), several_seeds()):
        assert validate_report(json.loads(json.dumps(report))) == report
    assert list(by_seed(validate_report(single_seed()))) == ["0"]
    assert list(by_seed(validate_report(several_seeds()))) == ["0", "1", "2"]


COMPARED = "seeds.1.alpha"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: m["entry"].pop("note"), f"{COMPARED}.entry must have the keys"),
        (lambda m: m["entry"].update(told_task=0), f"{COMPARED}.entry.told_task must be a bool, got 0"),
        (lambda m: m["entry"].update(changes=[]), f"{COMPARED}.entry.changes must be a dict"),
        (lambda m: m["stored"].update(bytes=3), f"{COMPARED}.stored must have the keys"),
        (lambda m: m["stored"].update(values=0), f"{COMPARED}.stored.values must be positive, got 0"),
        (lambda m: m.update(kept_samples=0), f"{COMPARED}.kept_samples must be a positive number, got 0"),
        (
            lambda m: m.update(peak_memory_bytes=1.5),
            f"{COMPARED}.peak_memory_bytes must be a positive number",
        ),
        (lambda m: m["inference"].update(prefills=0), f"{COMPARED}.inference.prefills must be positive"),
        (lambda m: m["inference"].update(base="1"), f"{COMPARED}.inference.base must be a finite number"),
    ],
)
def test_faults_of_a_comparison_are_named(damage: Damage, message: str) -> None:
    report = comparison()
    validate_report(report)
    damage(report["seeds"]["1"]["alpha"])
    with pytest.raises(ValueError, match=re.escape(message)):
        validate_report(report)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: r.pop("stream"), "report must have the keys"),
        (lambda r: r.update(stream=3), "report.stream must be a string, got 3"),
        (lambda r: r.update(extra=1), "unknown ['extra']"),
        (lambda r: r.update(seeds={}), "exactly one of 'methods' and 'seeds'"),
        (lambda r: r.update(base={"count": 1.0}), "base must have every task, got none for"),
        (lambda r: r.update(base=dict.fromkeys(TASKS, "1")), "base.colour-ring must be a finite number"),
        (lambda r: r.update(methods={}), "methods must be a non-empty object"),
        (lambda r: r["methods"]["cram"].pop("bwt"), "methods.cram must have the keys"),
        (lambda r: r["methods"]["cram"].update(bwt=float("nan")), "methods.cram.bwt must be a finite number"),
        (lambda r: r["methods"]["cram"].update(bwt=True), "methods.cram.bwt must be a finite number"),
        (lambda r: r["methods"]["cram"].update(tasks=[]), "methods.cram.tasks must be a list of task names"),
        (lambda r: r["methods"]["cram"].update(tasks=["a", "a", "b"]), "methods.cram.tasks must be unique"),
        (lambda r: r["methods"]["isolated"].update(tasks=["a", "b", "c"]), "methods.isolated.parameters"),
        (lambda r: r["methods"]["cram"]["matrix"].pop(), "methods.cram.matrix must be a list of 3 rows"),
        (
            lambda r: r["methods"]["cram"]["matrix"][1].append(1.0),
            "methods.cram.matrix[1] must be a list of 2",
        ),
        (
            lambda r: r["methods"]["cram"]["matrix"][1].__setitem__(0, "x"),
            "methods.cram.matrix[1][0] must be",
        ),
        (lambda r: r["methods"]["cram"]["seconds"]["per_task"].pop("spell"), "got none for ['spell']"),
        (lambda r: r["methods"]["cram"]["groups"].pop("spell"), "methods.cram.groups must have every task"),
        (
            lambda r: r["methods"]["cram"]["ranks"].update(other={"m": 1}),
            "methods.cram.ranks must be keyed by",
        ),
        (
            lambda r: r["methods"]["cram"]["ranks"].update(spell={"m": "4"}),
            "methods.cram.ranks.spell.m must be",
        ),
        (
            lambda r: r["methods"]["cram"]["routing"]["spell"].pop("mean_gates"),
            "methods.cram.routing.spell must",
        ),
        (
            lambda r: r["methods"]["cram"]["routing"]["spell"].update(gate_entropy="low"),
            "methods.cram.routing.spell.gate_entropy must be a finite number",
        ),
    ],
)
def test_faults_are_named(damage: Damage, message: str) -> None:
    report = single_seed()
    damage(report)
    with pytest.raises(ValueError, match=re.escape(message)):
        validate_report(report)


def test_methods_must_share_their_tasks() -> None:
    report = single_seed()
    renamed = json.loads(json.dumps(report["methods"]["isolated"]).replace("spell", "other"))
    report["methods"]["isolated"] = renamed
    with pytest.raises(ValueError, match=re.escape(f"tasks of the other methods {TASKS}")):
        validate_report(report)


def test_seeds_must_share_their_methods() -> None:
    report = several_seeds()
    del report["seeds"]["2"]["isolated"]
    with pytest.raises(ValueError, match="seeds must all have the same methods and tasks"):
        validate_report(report)


@pytest.mark.parametrize("value", [None, [], "report", 3])
def test_something_else_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="report must be a non-empty object"):
        validate_report(value)
