"""Rows of the gate table: who reads which, when rows are reused, and what a step without gates costs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cram.serve.vllm.group import GateGroup
from cram.serve.vllm.plugin.gate_table import NONE, ONES, GateTable

LAYERS, SLOT, RANK = 3, 8, 5
GROUP = GateGroup(1, ("a", "b"), (2, 3), LAYERS, ("m",), "content", {"bytes": 1, "sha256": ""})
RNG = np.random.default_rng(0)
GATES = {f"g{k}": RNG.random((LAYERS, 2)).astype(np.float32) for k in range(6)}
ADAPTER = {**dict.fromkeys(GATES, 1), "plain": 2, "base": 0}


def table_of(*requests: str, rows: int = 3) -> GateTable:
    """A table that knows some requests."""
    table = GateTable(LAYERS, rows, 64, SLOT, "cpu")
    for request in requests:
        table.remember(request, (GROUP, GATES[request]) if request in GATES else None)
    return table


def step(table: GateTable, requests: list[str], counts: list[int]) -> None:
    """Prepare a step and compare what every token of every layer is multiplied by."""
    adapters = [
        ADAPTER[request] for request, count in zip(requests, counts, strict=True) for _ in range(count)
    ]
    table.prepare(requests, np.array(counts), adapters)
    for layer in range(LAYERS):
        shrunk = torch.ones(2, sum(counts), SLOT)
        table.scale(shrunk, layer)
        at = 0
        for request, count in zip(requests, counts, strict=True):
            wanted = torch.full((SLOT,), float(request != "base"))
            if request in GATES:
                wanted = torch.zeros(SLOT)
                wanted[:RANK] = torch.from_numpy(GROUP.rows(GATES[request])[layer])
            found = shrunk[:, at : at + count]
            if table.acting:
                assert torch.equal(found, wanted.expand(2, count, -1)), (request, layer)
            at += count


def test_every_token_of_a_mixed_step_reads_the_gates_of_its_request_and_layer() -> None:
    table = table_of("g0", "g1", "g2", "plain", "base")
    step(table, ["g1", "plain", "g0", "base", "g2"], [3, 1, 7, 2, 1])
    step(table, ["g2", "g0", "base"], [1, 1, 1])


def test_rows_of_finished_and_preempted_requests_are_used_again() -> None:
    table = table_of("g0", "g1", "g2", rows=3)
    step(table, ["g0", "g1", "g2"], [2, 2, 2])
    table.forget("g1")
    table.remember("g3", (GROUP, GATES["g3"]))
    step(table, ["g3", "g0"], [4, 1])
    table.remember(
        "g4", (GROUP, GATES["g4"])
    )  # g2 waits: its row is taken, and written anew when it runs again
    step(table, ["g4", "g3", "g0"], [1, 1, 1])
    step(table, ["g2", "g4"], [1, 3])


def test_a_request_that_comes_again_has_its_new_gates() -> None:
    table = table_of("g0")
    step(table, ["g0"], [2])
    table.remember("g0", None)
    table.prepare(["g0"], np.array([2]), [2, 2])
    assert table.index[:2].tolist() == [ONES, ONES]


def test_a_dummy_run_has_gates_of_one_where_there_is_an_adapter() -> None:
    table = table_of()
    table.prepare(None, None, (1, 1, 0))
    assert table.index[:3].tolist() == [ONES, ONES, NONE]


def test_an_unknown_request_is_refused() -> None:
    with pytest.raises(RuntimeError, match="request g0 must be scheduled before it runs"):
        table_of().prepare(["g0"], np.array([1]), [1])


@pytest.mark.parametrize(
    ("requests", "acting", "idle"),
    [
        (["base", "base"], False, True),
        (["plain"], False, False),
        (["plain", "base"], True, False),
        (["g0"], True, False),
    ],
)
def test_a_step_that_nothing_gates_is_not_multiplied(requests: list[str], acting: bool, idle: bool) -> None:
    table = table_of("g0", "plain", "base")
    table.prepare(requests, np.ones(len(requests), int), [ADAPTER[request] for request in requests])
    assert (table.acting, table.idle) == (acting, idle)
