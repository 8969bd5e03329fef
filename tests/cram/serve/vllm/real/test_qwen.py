"""A Qwen2.5-VL shaped checkpoint in vLLM's engine, against explicit weight deltas."""

from __future__ import annotations

from tests.cram.serve.vllm.real.worlds import LONG, Job, World, mixed


def test_one_batch_of_five_gate_tensors_a_plain_adapter_and_the_base(qwen: World) -> None:
    qwen.check(mixed(qwen))


def test_prefixes_are_shared_by_equal_gates_alone(qwen: World) -> None:
    gates = qwen.gates(10)
    other = gates.copy()
    other[1, 1] += 0.5
    cached = [qwen.check([Job(LONG, (7,), each)])[0] for each in (gates, other, gates)]
    assert cached[:2] == [0, 0] and cached[2] >= 32
