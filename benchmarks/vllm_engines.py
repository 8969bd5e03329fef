"""Engines of vLLM for the benchmark of its plugin: one random LLaVA with a group of experts and a plain LoRA.

Each engine has a process of its own, with the plugin or without it, and works only when it is asked.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import entry_points
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.served import RANK, SHAPES, Shape, base_of, factors, processor_of, with_experts

EXPERTS, ROWS = 4, 8
SLOT = EXPERTS * RANK
PLUGINS, OURS = "vllm.general_plugins", "cram"
SETTINGS = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}


@dataclass(frozen=True)
class Work:
    """What an engine does at once: `ROWS` requests of one kind.

    Attributes:
        kind: "base", "plain" or "gated".
        prompt: Tokens of each prompt.
        answer: Tokens of each answer.
        seed: Of prompts and gates.
    """

    kind: str
    prompt: int
    answer: int
    seed: int


def prepare(place: Path, shape: str) -> Path:
    """Write `model`, `plain` and the exported group into a folder; returns the group's folder."""
    from safetensors.torch import load_file, save_file

    import cram
    from cram.bundle.peft_folder import write_adapter
    from cram.serve.vllm.base import published
    from cram.serve.vllm.export import export_groups

    chosen = SHAPES[shape]
    processor = processor_of(chosen)
    model, encoder = base_of(chosen, processor, torch.float32)
    model.save_pretrained(place / "model")
    processor.save_pretrained(place / "model")
    file = place / "model/model.safetensors"
    save_file(published(load_file(file)), file, metadata={"format": "pt"})
    with_experts(model, encoder, processor, EXPERTS)
    cram.save(model, place / "bundle")
    (place / "plain").mkdir()
    write_adapter(place / "plain", _plain(model), 1.0, None)
    (adapter,) = export_groups(place / "bundle", place / "out")
    return place / "out" / adapter.name


def _plain(model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """One random LoRA that fills the slot as the group does."""
    drawn = [factors(model.cram.modules, 100 + index) for index in range(EXPERTS)]
    return {
        path: (torch.cat([one[path][0] for one in drawn]), torch.cat([one[path][1] for one in drawn], 1))
        for path in model.cram.modules
    }


def engine(place: Path, group: Path, shape: Shape, pipe: Connection) -> None:
    """Answer `Work` from a pipe with CPU seconds and wall seconds, until the other end is closed."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from cram.serve.vllm.group import KEY, encode

    llm = LLM(
        str(place / "model"),
        dtype="float32",
        max_model_len=256,
        enforce_eager=True,
        max_num_seqs=ROWS,
        max_num_batched_tokens=512,
        block_size=32,
        enable_prefix_caching=False,
        limit_mm_per_prompt={"image": 1},
        enable_lora=True,
        max_lora_rank=SLOT,
        max_loras=2,
    )
    adapters = {"plain": LoRARequest("plain", 1, str(place / "plain"))}
    adapters["gated"] = LoRARequest(group.name, 2, str(group))
    pipe.send("ready")
    while True:
        try:
            work: Work = pipe.recv()
        except EOFError:
            return
        generator = np.random.default_rng(work.seed)
        prompts = [
            {"prompt_token_ids": generator.integers(4, shape.vocabulary // 2, work.prompt).tolist()}
            for _ in range(ROWS)
        ]
        gates = generator.dirichlet(np.ones(EXPERTS), (ROWS, shape.layers))
        extra = [{KEY: encode(row)} if work.kind == "gated" else None for row in gates]
        params = [
            SamplingParams(temperature=0, max_tokens=work.answer, ignore_eos=True, extra_args=each)
            for each in extra
        ]
        adapter = adapters.get(work.kind)
        began, before = time.perf_counter(), time.process_time()
        llm.generate(prompts, params, lora_request=[adapter] * ROWS if adapter else None, use_tqdm=False)
        pipe.send((time.process_time() - before, time.perf_counter() - began))


@contextmanager
def engines(place: Path, group: Path, shape: str) -> Iterator[dict[bool, Connection]]:
    """An engine with the plugin (True) and one without it."""
    context, pipes, processes = get_context("spawn"), {}, []
    os.environ.update(SETTINGS)
    others = [point.name for point in entry_points(group=PLUGINS) if point.name != OURS]
    try:
        for plugin in (True, False):
            os.environ["VLLM_PLUGINS"] = ",".join([*others, OURS] if plugin else others)
            pipes[plugin], theirs = context.Pipe()
            process = context.Process(target=engine, args=(place, group, SHAPES[shape], theirs), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            if pipes[plugin].recv() != "ready":
                raise RuntimeError("an engine must be ready, got another message")
        yield pipes
    finally:
        for pipe in pipes.values():
            pipe.close()
        for process in processes:
            process.join(30)
