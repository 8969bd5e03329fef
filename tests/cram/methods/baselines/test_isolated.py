"""Isolated LoRAs: the task is told, and it is one that was learnt."""

from __future__ import annotations

import pytest
import torch

from cram.attach import attach
from cram.config import CramConfig
from cram.methods.baselines.isolated import IsolatedMethod
from tests.cram import factories


def test_the_told_task_chooses_its_own_lora() -> None:
    handle = attach(factories.llava(), CramConfig(method="isolated"), factories.clip_encoder())
    method = handle.method
    method.begin_task("one", 4)
    handle.freeze()
    method.begin_task("two", 4)
    assert torch.equal(method.gates("one"), torch.tensor([1.0, 0.0]))
    assert torch.equal(method.gates("two"), torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"must be one of the learnt ones \['one', 'two'\], got 'three'"):
        method.gates("three")
    with pytest.raises(ValueError, match=r"isolated must be told the task, got none.*of \['one', 'two'\]"):
        method.route(None, training=False)
    assert method.values_per_expert() == 0


def test_a_report_says_the_first_paragraph() -> None:
    about = IsolatedMethod.about()
    assert about.startswith("Isolated LoRAs, the upper bound: ") and about.endswith(" task at test time.")
