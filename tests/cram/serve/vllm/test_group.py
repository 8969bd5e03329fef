"""Gates as requests carry them, what is refused of them, and what the prefix cache is told."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest

from cram.serve.vllm.group import GateGroup, encode, slot_of

GROUP = GateGroup(1, ("a", "b"), (2, 1), 3, ("m",), "content", {"bytes": 1, "sha256": ""})
GATES = np.arange(6, dtype=np.float32).reshape(3, 2) / 8


def test_three_spellings_give_the_same_gates() -> None:
    assert np.array_equal(GROUP.gates(encode(GATES)), GATES)
    assert np.array_equal(GROUP.gates(GATES.reshape(-1).tolist()), GATES)
    assert np.array_equal(GROUP.gates([0.5, 2]), np.tile(np.array([0.5, 2], np.float32), (3, 1)))


def test_rows_repeat_an_expert_over_its_rank() -> None:
    assert np.array_equal(GROUP.rows(GATES), GATES[:, [0, 0, 1]])


@pytest.mark.parametrize(
    "value",
    [
        None,
        3.0,
        {},
        encode(GATES[:2]),
        "!" * 32,
        "A" * 8_000_000,
        encode(np.full((3, 2), np.nan)),
        encode(np.full((3, 2), np.inf)),
        encode(np.full((3, 2), 101.0)),
        [float("nan")] * 6,
        [1e30] * 6,
        [10**400] * 6,
        ["1"] * 6,
        [True] * 6,
        [[0.5, 0.5]] * 3,
        [1.0] * 5,
        base64.b64encode(b"x").decode(),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="'cram_gates' must be base64 of 3 x 2 float32"):
        GROUP.gates(value)


def test_the_salt_differs_with_one_gate_and_with_the_content() -> None:
    other = GATES.copy()
    other[2, 1] += 1e-6
    twin = GateGroup(**{**vars(GROUP), "content": "another"})
    assert GROUP.salt(GATES) == GROUP.salt(GATES.copy())
    assert len({GROUP.salt(GATES), GROUP.salt(other), twin.salt(GATES)}) == 3


def test_ranks_are_rounded_up_to_the_ladder_of_vllm() -> None:
    assert [slot_of(rank) for rank in (1, 2, 9, 16, 17, 257, 512)] == [1, 8, 16, 16, 32, 320, 512]
    with pytest.raises(ValueError, match="rank must be at most 512, got 513"):
        slot_of(513)
