"""Real vLLM on a CPU: the environment that it needs, checkpoints with bundles, and engines.

These tests run in the environment of `make vllm-tests`; elsewhere they skip.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import cram
from cram.base import base_folder
from cram.serve.vllm.export import Adapter, export_groups
from tests.cram.serve.vllm.real import checkpoints
from tests.cram.serve.vllm.real.worlds import World, engine_of, plain_adapter

HERE = Path(__file__).parent
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # With spinning threads on a shared machine the same test takes minutes in place of seconds.
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
os.environ.update({name: value for name, value in SETTINGS.items() if name not in os.environ})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests of this folder where vLLM is not installed."""
    if find_spec("vllm") is not None:
        return
    skip = pytest.mark.skip(reason="vLLM is not installed here; run `make vllm-tests`")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(skip)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[World]:
    """The built-in LLaVA with five experts in two groups, in one engine with the module's ENGINE."""
    place = tmp_path_factory.mktemp("llava")
    checkpoints.llava(place / "model")
    yield from world_in(
        place,
        base_folder() / "llava",
        checkpoints.LLAVA_VOCABULARY,
        {"image": 2},
        **getattr(request.module, "ENGINE", {}),
    )


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A random Qwen2.5-VL with five experts in two groups, in one engine."""
    place = tmp_path_factory.mktemp("qwen")
    checkpoints.qwen2_5_vl(place / "model")
    # A video would need a processor that needs torchvision.
    yield from world_in(place, place / "model", checkpoints.QWEN_VOCABULARY, {"image": 2, "video": 0})


def world_in(
    place: Path, source: Path, vocabulary: int, limits: dict[str, int], **settings: Any
) -> Iterator[World]:
    """Bundle, export and engine for the checkpoint `model` in a folder; transformers loads `source`."""
    model, processor, handle = checkpoints.attached(source, base_folder() / "clip")
    cram.save(model, place / "bundle")
    adapters: list[Adapter] = export_groups(place / "bundle", place / "out")
    plain = plain_adapter(handle, place / "plain")
    engine = engine_of(place / "model", max_logprobs=vocabulary, limit_mm_per_prompt=limits, **settings)
    yield World(place, source, model, processor, handle, adapters, plain, engine, vocabulary)
