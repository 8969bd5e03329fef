"""PEFT's way to serve several adapters: `generate` over fixed batches, each row with its `adapter_names`."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.served import NEAR, RANK, Shape, base_of, factors, processor_of
from benchmarks.variants import PROJECTIONS


def rate(
    shape: Shape, dtype: torch.dtype, threads: int, bodies: Sequence[dict[str, Any]], rows: int
) -> dict[str, float]:
    """Tokens per second over all requests in batches of `rows`, in a process of its own.

    Every request counts the tokens that it asks for; a batch runs until its longest answer has ended.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(shape, dtype, threads, list(bodies), rows, theirs))
    process.start()
    try:
        while not ours.poll(0.2):
            if not process.is_alive():
                raise RuntimeError(f"PEFT must answer, got exit code {process.exitcode}")
        found: dict[str, float] = ours.recv()
        return found
    finally:
        process.terminate()
        process.join()


def _run(
    shape: Shape,
    dtype: torch.dtype,
    threads: int,
    bodies: list[dict[str, Any]],
    rows: int,
    pipe: Connection,
) -> None:
    torch.set_num_threads(threads)
    processor = processor_of(shape)
    processor.tokenizer.padding_side = "left"
    model = _adapted(base_of(shape, processor, dtype)[0])
    batches = [bodies[start : start + rows] for start in range(0, len(bodies), rows)]
    _answer(model, processor, [{**body, "max_tokens": 2} for body in batches[0]])
    began = time.monotonic()
    for batch in batches:
        _answer(model, processor, batch)
    seconds = time.monotonic() - began
    tokens = sum(body["max_tokens"] for body in bodies)
    pipe.send({"tokens_per_s": tokens / seconds, "seconds": seconds, "rows": rows})


def _adapted(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=PROJECTIONS)
    adapted = get_peft_model(model, config, adapter_name="task0")
    for index in range(1, NEAR):
        adapted.add_adapter(f"task{index}", config)
    linears = {name: module for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    for index in range(NEAR):
        for name, (a, b) in factors(linears, index).items():
            linears[name].lora_A[f"task{index}"].weight.data = a.to(model.dtype)
            linears[name].lora_B[f"task{index}"].weight.data = b.to(model.dtype)
    return adapted.eval()


def _answer(model: Any, processor: Any, batch: list[dict[str, Any]]) -> None:
    from PIL import Image

    texts, pictures, names = [], [], []
    for index, body in enumerate(batch):
        parts = body["messages"][0]["content"]
        for part in parts[:-1]:
            encoded = part["image_url"]["url"].partition(",")[2]
            pictures.append(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB"))
        images = processor.image_token * (len(parts) - 1)
        texts.append(f"USER: {images}\n{parts[-1]['text']} ASSISTANT:")
        names.append(f"task{index % NEAR}")
    inputs = processor(text=texts, images=pictures or None, padding=True, return_tensors="pt")
    longest = max(body["max_tokens"] for body in batch)
    lengths = {"max_new_tokens": longest, "min_new_tokens": longest}
    with torch.no_grad():
        model.generate(**inputs, **lengths, do_sample=False, adapter_names=names)
