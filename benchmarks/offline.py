"""What the same requests cost without a server, each figure from a process of its own.

`adapter_names` is PEFT's way to serve several adapters: `generate` over fixed batches. `forwards` counts the
bare model's forwards alone, which is the most that a server can reach on the machine.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import torch

from benchmarks.served import NEAR, RANK, Shape, base_of, factors, processor_of, with_experts
from benchmarks.variants import PROJECTIONS

STEPS = 32
Bodies = list[dict[str, Any]]


def apart(measure: Callable[..., Any], threads: int, *arguments: Any) -> Any:
    """What `measure(*arguments)` returns in a process of its own with so many threads.

    Raises:
        RuntimeError: If the process ends without an answer.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(measure, threads, arguments, theirs))
    process.start()
    try:
        while not ours.poll(0.2):
            if not process.is_alive():
                raise RuntimeError(f"{measure.__name__} must answer, got exit code {process.exitcode}")
        return ours.recv()
    finally:
        process.terminate()
        process.join()


def _run(measure: Callable[..., Any], threads: int, arguments: tuple[Any, ...], pipe: Connection) -> None:
    torch.set_num_threads(threads)
    with torch.no_grad():
        pipe.send(measure(*arguments))


def adapter_names(shape: Shape, dtype: torch.dtype, bodies: Bodies, rows: int) -> dict[str, float]:
    """Tokens per second of PEFT over all requests in batches of `rows`, each row with its adapter.

    Every request counts the tokens that it asks for; a batch runs until its longest answer has ended.
    """
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
    return {"tokens_per_s": tokens / seconds, "seconds": seconds, "rows": rows}


def forwards(shape: Shape, dtype: torch.dtype, bodies: Bodies, rows: Sequence[int]) -> list[dict[str, float]]:
    """Tokens per second of the bare model if every step had so many rows and nothing else took time.

    Every prompt is read alone. A step over the cache of the last prompt stands for all steps; its figure is
    the median of `STEPS`. The linears are those of the server.

    Args:
        shape: Of the model.
        dtype: Of the model.
        bodies: The requests.
        rows: Rows of a step, one figure for each.
    """
    from cram.serve.engine.few_rows import use_native_products

    processor = processor_of(shape)
    model, encoder = base_of(shape, processor, dtype)
    with_experts(model, encoder, processor, 0)
    use_native_products(model)
    _prompt(model, processor, bodies[0])
    began = time.monotonic()
    for body in bodies:
        cache = _prompt(model, processor, body)
    reading = time.monotonic() - began
    tokens = sum(body["max_tokens"] for body in bodies)
    found = []
    for count in rows:
        step = _step_seconds(model, cache, count)
        seconds = reading + (tokens - len(bodies)) * step / count
        found.append({"tokens_per_s": tokens / seconds, "seconds": seconds, "rows": count})
    return found


def _prompt(model: Any, processor: Any, body: dict[str, Any]) -> Any:
    """Read one prompt; its cache."""
    from cram.model.cache import made_cache

    return made_cache(model(**_inputs(processor, [body]), use_cache=True, logits_to_keep=1))


def _step_seconds(model: Any, cache: Any, rows: int) -> float:
    """Seconds of a step of so many rows, each with the prompt of a cache of one row."""
    import copy

    from cram.model.cache import cache_argument

    cache = copy.deepcopy(cache)
    cache.batch_repeat_interleave(rows)
    ids, taken = torch.full((rows, 1), 5), []
    for _ in range(STEPS):
        began = time.monotonic()
        model(input_ids=ids, use_cache=True, **{cache_argument(model): cache})
        taken.append(time.monotonic() - began)
    return median(taken)


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


def _answer(model: Any, processor: Any, batch: Bodies) -> None:
    names = [f"task{index % NEAR}" for index in range(len(batch))]
    longest = max(body["max_tokens"] for body in batch)
    lengths = {"max_new_tokens": longest, "min_new_tokens": longest}
    model.generate(**_inputs(processor, batch), **lengths, do_sample=False, adapter_names=names)


def _inputs(processor: Any, batch: Bodies) -> Any:
    """The prompts and pictures of some requests as the model takes them."""
    from PIL import Image

    texts, pictures = [], []
    for body in batch:
        parts = body["messages"][0]["content"]
        for part in parts[:-1]:
            encoded = part["image_url"]["url"].partition(",")[2]
            pictures.append(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB"))
        images = processor.image_token * (len(parts) - 1)
        texts.append(f"USER: {images}\n{parts[-1]['text']} ASSISTANT:")
    return processor(text=texts, images=pictures or None, padding=True, return_tensors="pt")
