"""Two ranks, each with half of every LoRA: the gates act between the halves."""

from __future__ import annotations

import pytest

from tests.cram.serve.vllm.real.worlds import LONG, Job, World, mixed

ENGINE = {"tensor_parallel_size": 2, "fully_sharded_loras": True}

pytestmark = pytest.mark.slow


def test_one_batch_of_five_gate_tensors_a_plain_adapter_and_the_base(llava: World) -> None:
    llava.check(mixed(llava))


def test_prefixes_are_shared_by_equal_gates_alone(llava: World) -> None:
    cached = [llava.check([Job(LONG, (7,), llava.gates(seed))])[0] for seed in (10, 11, 10)]
    assert cached[:2] == [0, 0] and cached[2] >= 32
