"""Two ranks with whole LoRA matrices A, and with halves of all: the gates act between A and B."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cram.base import base_folder
from tests.cram.serve.vllm.real import checkpoints
from tests.cram.serve.vllm.real.conftest import world_in
from tests.cram.serve.vllm.real.worlds import LONG, Job, World, mixed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "fully sharded"])
def llava(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[World]:
    """The built-in LLaVA with five experts in two groups, on two ranks."""
    place = tmp_path_factory.mktemp("llava")
    checkpoints.llava(place / "model")
    source, limits = base_folder() / "llava", {"image": 2}
    ranks = {"tensor_parallel_size": 2, "fully_sharded_loras": request.param}
    with pytest.MonkeyPatch.context() as patch:
        # Each engine in processes of its own, since one process holds one engine well.
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        yield from world_in(place, source, checkpoints.LLAVA_VOCABULARY, limits, **ranks)


def test_one_batch_of_five_gate_tensors_a_plain_adapter_and_the_base(llava: World) -> None:
    llava.check(mixed(llava))


def test_prefixes_are_shared_by_equal_gates_alone(llava: World) -> None:
    cached = [llava.check([Job(LONG, (7,), llava.gates(seed))])[0] for seed in (10, 11, 10)]
    assert cached[:2] == [0, 0] and cached[2] >= 32
