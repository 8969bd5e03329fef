"""Two ranks that share every LoRA: whole A and half of B each, or half of both with the gates in between."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cram.serve.vllm.real.conftest import llava_in
from tests.cram.serve.vllm.real.worlds import LONG, Job, World, mixed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[False, True], ids=["sharded", "fully sharded"])
def llava(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The built-in LLaVA on two ranks."""
    settings = {"tensor_parallel_size": 2, "fully_sharded_loras": request.param}
    yield from llava_in(tmp_path_factory.mktemp("llava"), **settings)


def test_one_batch_of_five_gate_tensors_a_plain_adapter_and_the_base(llava: World) -> None:
    llava.check(mixed(llava))


def test_prefixes_are_shared_by_equal_gates_alone(llava: World) -> None:
    cached = [llava.check([Job(LONG, (7,), llava.gates(seed))])[0] for seed in (10, 11, 10)]
    assert cached[:2] == [0, 0] and cached[2] >= 32
