"""How the samples of a task were routed, from the rows of their answers."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from cram.learning.answers.generate import routing_of
from cram.learning.answers.journal import AnswerRow

METHOD: Any = SimpleNamespace(expert_groups=lambda: {"first": 0, "second": 0, "third": 1})


def row(group: int, *gates: float) -> AnswerRow:
    return {"text": "", "group": group, "gates": list(gates)}


def test_routing_is_measured_sample_by_sample() -> None:
    """Two experts that take turns are no mixture; their mean gates look like one."""
    turns = routing_of(METHOD, "first", [row(0, 1, 0, 0), row(0, 0, 1, 0)])
    mixed = routing_of(METHOD, "first", [row(0, 0.5, 0.5, 0), row(1, 0.5, 0.5, 0)])
    assert turns is not None and mixed is not None
    assert turns["mean_gates"] == mixed["mean_gates"] == {"first": 0.5, "second": 0.5, "third": 0.0}
    assert (turns["gate_entropy"], mixed["gate_entropy"]) == (0.0, pytest.approx(math.log(2)))
    assert (turns["expert_accuracy"], turns["group_accuracy"], mixed["group_accuracy"]) == (50, 100, 50)


def test_a_method_without_the_tasks_own_expert_has_no_routing() -> None:
    assert routing_of(METHOD, "other", [row(0, 1, 0, 0)]) is None
