"""One checkpoint with its bundle in an engine of vLLM, and the comparison of answers with the references."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cram.bundle.peft_folder import write_adapter
from cram.loading import load_model
from cram.model.attached import AttachedModel
from cram.serve.vllm.export import Adapter
from cram.serve.vllm.group import KEY, encode
from tests.cram import factories
from tests.cram.serve.vllm.real import checkpoints
from tests.cram.serve.vllm.real.reference import Deltas, Gates, in_process, table_of

PLAIN_ID = 99
LONG = (
    "Look at the picture again and again, then tell me: what color is the shape in it, and what lies there?"
)
SHORT = "What color is the shape?"
EXPLICIT, IN_PROCESS = 1e-4, 1e-3


@dataclass
class Job:
    """One request.

    Attributes:
        text: The question; or token ids.
        seeds: Its pictures.
        who: Gates [L, E], "plain" or "base".
        group: Which adapter, for gates.
    """

    text: str | list[int]
    seeds: tuple[int, ...]
    who: Gates | str
    group: int = 0


@dataclass
class World:
    """A checkpoint in an engine.

    Attributes:
        place: Folder with `model`, `bundle`, `out` and `plain`.
        source: What transformers loads.
        model, processor, handle: The attached model in process.
        adapters: The exported groups.
        plain: Module path -> delta of the plain adapter.
        engine: vLLM's `LLM`.
        vocabulary: Tokens.
    """

    place: Path
    source: Path
    model: Any
    processor: Any
    handle: AttachedModel
    adapters: list[Adapter]
    plain: dict[str, Tensor]
    engine: Any
    vocabulary: int

    @cached_property
    def deltas(self) -> Deltas:
        """The base model with explicit deltas."""
        return Deltas(load_model(self.source, device="cpu"), self.handle, self.plain)

    def gates(self, seed: int, group: int = 0) -> Gates:
        """Gates [L, E] that differ from layer to layer."""
        adapter = self.adapters[group].group
        drawn = np.random.default_rng(seed).dirichlet(np.ones(len(adapter.experts)), adapter.layers)
        return drawn.astype(np.float32)

    def request(self, job: Job) -> Any:
        """vLLM's `LoRARequest` of a job, or None for the base."""
        from vllm.lora.request import LoRARequest

        if isinstance(job.who, str):
            return LoRARequest("plain", PLAIN_ID, str(self.place / "plain")) if job.who == "plain" else None
        adapter = self.adapters[job.group]
        return LoRARequest(adapter.name, 1 + job.group, str(self.place / "out" / adapter.name))

    def sampling(self, who: Any, tokens: int = 8) -> Any:
        """Greedy sampling with all log-probabilities; `who` may also be what a client sends as gates."""
        from vllm import SamplingParams

        value = encode(who) if isinstance(who, np.ndarray) else who
        extra = None if isinstance(value, str) and value in ("plain", "base") else {KEY: value}
        return SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=self.vocabulary, extra_args=extra
        )

    def prompt(self, job: Job) -> Any:
        """What the engine is given."""
        if not isinstance(job.text, str):
            return {"prompt_token_ids": job.text}
        images = [factories.image(seed) for seed in job.seeds]
        turn = [{"type": "image"} for _ in images] + [{"type": "text", "text": job.text}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": turn}], tokenize=False, add_generation_prompt=True
        )
        return {"prompt": text, **({"multi_modal_data": {"image": images}} if images else {})}

    def pixels(self, job: Job) -> dict[str, Tensor]:
        """The same pictures for the reference."""
        if not job.seeds:
            return {}
        made = self.processor.image_processor(
            images=[factories.image(seed) for seed in job.seeds], return_tensors="pt"
        )
        return dict(made)

    def run(self, jobs: list[Job], tokens: int = 8) -> list[Any]:
        """Answers of the engine, all in one call."""
        return list(
            self.engine.generate(
                [self.prompt(job) for job in jobs],
                [self.sampling(job.who, tokens) for job in jobs],
                lora_request=[self.request(job) for job in jobs],
                use_tqdm=False,
            )
        )

    def differences(self, jobs: list[Job], outputs: list[Any], own: bool = False) -> tuple[float, bool]:
        """Largest difference in log-probability over all answers, tokens and the vocabulary; whether every
        token is the reference's greedy one.

        Args:
            jobs: What was asked.
            outputs: The answers.
            own: Compare with the attached model in place of explicit deltas.
        """
        worst, same = 0.0, True
        for job, output in zip(jobs, outputs, strict=True):
            answer, prompt = list(output.outputs[0].token_ids), list(output.prompt_token_ids)
            group, pixels = self.adapters[job.group].group, self.pixels(job)
            if own and not isinstance(job.who, str):
                wanted = in_process(self.handle, self.model, job.who, group, prompt, answer, pixels)
            else:
                wanted = self.deltas.logprobs(job.who, group, prompt, answer, pixels)
            found = table_of(output.outputs[0], self.vocabulary)
            worst = max(worst, float((wanted - found).abs().max()))
            same = same and wanted.argmax(-1).tolist() == answer
        return worst, same

    def check(self, jobs: list[Job], tokens: int = 8) -> list[int]:
        """Run, compare with both references, and return the cached tokens of each request."""
        outputs = self.run(jobs, tokens)
        worst, same = self.differences(jobs, outputs)
        print(f"{len(jobs)} requests: {worst:.1e} from explicit deltas")
        assert worst < EXPLICIT and same, worst
        worst, same = self.differences(jobs, outputs, own=True)
        assert worst < IN_PROCESS and same, worst
        return [output.num_cached_tokens for output in outputs]


def plain_adapter(handle: AttachedModel, folder: Path) -> dict[str, Tensor]:
    """Write an ordinary PEFT LoRA; returns its delta per module."""
    made = {}
    for path, (a, b) in checkpoints.weights(handle, 77).items():
        whole_a, whole_b = torch.zeros(8, a.shape[1]), torch.zeros(b.shape[0], 8)
        kept = min(8, len(a))
        whole_a[:kept], whole_b[:, :kept] = a[:kept], b[:, :kept]
        made[path] = (whole_a, whole_b)
    folder.mkdir()
    write_adapter(folder, made, handle.config.scale, None)
    return {path: handle.config.scale * (b @ a) for path, (a, b) in made.items()}


def engine_of(model: Path, **settings: Any) -> Any:
    """An engine in this process, with small steps, so that prompts are read in chunks."""
    from vllm import LLM

    chosen = {
        "dtype": "float32",
        "max_model_len": 256,
        "enforce_eager": True,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "block_size": 32,
        "enable_lora": True,
        "max_lora_rank": 32,
        "max_loras": 3,
        "max_cpu_loras": 6,
    }
    return LLM(str(model), **{**chosen, **settings})


def mixed(world: World) -> list[Job]:
    """Five gate tensors in two groups, with pictures and without, a plain adapter and the base."""
    return [
        Job(SHORT, (0,), world.gates(0)),
        Job(LONG, (1,), world.gates(1)),
        Job(LONG, (2,), world.gates(2, 1), 1),
        Job(SHORT, (0, 3), world.gates(3)),
        Job("Hello there.", (), world.gates(4, 1), 1),
        Job(SHORT, (0,), "plain"),
        Job(LONG, (4,), "base"),
    ]
