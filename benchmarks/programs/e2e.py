"""A whole model: a training step and generated tokens with CRAM, PEFT, the released loop, and bare.

All variants share the base's weights and run interleaved. A step is forward, backward and AdamW on what the
variant trains; the bare model's goes back to its input embeddings. PEFT's adapters are in the model's dtype,
which favours them; CRAM's are float32, as it keeps them. CRAM routes by itself: with the CLIP of the shipped
base, and on a random LLaVA with a random CLIP. Before every prompt it forgets the texts that this CLIP has
seen, so that every request counts as new.

A token is timed twice: as `generate` makes it, which on a GPU waits for the host, and as one decode step
behind a cache of fixed size, which a CUDA graph replays, as servers do.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine, markdown, models
from benchmarks.cases import DTYPES
from benchmarks.models import Work
from benchmarks.report import duration
from benchmarks.suite import failures
from benchmarks.timing import Limits, Sampler, interleaved, sampler
from benchmarks.variants import BUILDERS, Variant, built

HEADER = (
    "variant",
    "training step",
    "over bare",
    "over peft",
    "peak memory",
    "prompt",
    "prefill over bare",
    "token",
    "decode over bare",
    "captured token",
    "captured over bare",
)
ANSWERS = ("prompt_us", "token_us", "captured_us")
# Tokens that a cache of fixed size holds beyond the prompt; every timed decode step takes one.
SPARE_TOKENS = 1024


def train_step(variant: Variant, work: Work) -> Callable[[], Tensor]:
    """Return one optimiser step as a function."""
    from cram.learning.training import answer_loss

    optimizer = torch.optim.AdamW(variant.parameters, lr=1e-4) if variant.parameters else None

    def step() -> Tensor:
        with variant.around():
            loss = answer_loss(variant.model, dict(work.batch), work.labels)
        if variant.extra_loss is not None:
            loss = loss + variant.extra_loss()
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def generate(variant: Variant, work: Work, tokens: int) -> Callable[[], Tensor]:
    """Return greedy generation of exactly `tokens` tokens per prompt."""
    limits = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}

    def run() -> Tensor:
        variant.forget()
        with variant.around(), torch.no_grad():
            return variant.model.generate(**work.prompt, **limits)

    return run


def decode_step(variant: Variant, work: Work) -> Callable[[], Tensor]:
    """Return a decode step of every prompt behind a cache of fixed size, which fills by a token each time."""
    from transformers import StaticCache

    model, rows, length = variant.model, *work.prompt["input_ids"].shape
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=length + SPARE_TOKENS)
    token = work.prompt["input_ids"][:, -1:].clone()
    position = torch.full((rows, 1), length, device=token.device)
    variant.forget()
    with variant.around(), torch.no_grad():
        model(**work.prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def step() -> Tensor:
        with variant.around(), torch.no_grad():
            output = model(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True)
        return output.logits

    return step


def captured(
    variants: Mapping[str, Variant], work: Work, device: torch.device, limits: Limits
) -> dict[str, dict[str, Any]]:
    """Return the median time of each variant's decode step, on CUDA replayed; or why there is none."""
    rows: dict[str, dict[str, Any]] = {}
    samplers = {}
    for name, variant in variants.items():
        try:
            # The released loop reads its gates on the host.
            samplers[name] = sampler([decode_step(variant, work)], device, captured=name != "released")
        except failures() as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            rows[name] = {"captured_us": None, "captured_failed": f"{type(error).__name__}: {first[:200]}"}
    times = interleaved(samplers, device, limits)
    return rows | {
        name: {"captured_us": found.median_us, "captured_mode": samplers[name].mode}
        for name, found in times.items()
    }


def timed(steps: dict[Any, Callable[[], Any]], device: torch.device, limits: Limits) -> dict[Any, float]:
    """Return the median time of each step in microseconds. Steps run interleaved, after one call each."""
    for step in steps.values():
        step()
    samplers = {name: Sampler(step, 1, "eager") for name, step in steps.items()}
    return {name: found.median_us for name, found in interleaved(samplers, device, limits).items()}


def peak_bytes(step: Callable[[], Any], device: torch.device) -> int | None:
    """Return the bytes that a call allocates at its peak beyond the present ones. None if not on CUDA."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(
    work: Work, variants: Mapping[str, Variant], device: torch.device, tokens: int, limits: Limits
) -> dict[str, dict[str, float | None]]:
    """Return per variant the time of a training step and its peak, of a prompt, and of a further token."""
    for variant in variants.values():
        variant.model.train()
    steps = {name: train_step(variant, work) for name, variant in variants.items()}
    trained = timed(steps, device, limits)
    peaks = {name: peak_bytes(step, device) for name, step in steps.items()}
    for variant in variants.values():
        variant.model.eval()
    plain = {name: variant for name, variant in variants.items() if variant.extra_loss is None}
    both = {(n, count): generate(v, work, count) for n, v in plain.items() for count in (1, tokens + 1)}
    answered = timed(both, device, limits)
    replayed = captured(plain, work, device, limits)
    return {
        name: {
            "step_us": trained[name],
            "peak_bytes": peaks[name],
            "prompt_us": answered.get((name, 1)),
            "token_us": (answered[name, tokens + 1] - answered[name, 1]) / tokens if name in plain else None,
            **replayed.get(name, {"captured_us": None}),
        }
        for name in variants
    }


def lines(found: dict[str, Any]) -> list[str]:
    """Return the page line by line."""
    environment, rows = found["environment"], found["rows"]
    shape = ", ".join(f"{name} {value}" for name, value in found["settings"].items())
    shown = [
        f"# End to end, {environment['machine']}",
        "",
        f"{shape}; commit {environment['commit']}, load {environment['load']}. Medians.",
        "",
    ]
    cells = []
    for name, row in rows.items():
        ratios = [
            f"{row['step_us'] / rows[other]['step_us']:.2f}" if other in rows else "–"
            for other in ("bare", "peft")
        ]
        peak = f"{row['peak_bytes'] / 2**20:.0f} MiB" if row["peak_bytes"] is not None else "–"
        answers = []
        for figure in ANSWERS:
            time, bare = row.get(figure), rows.get("bare", {}).get(figure)
            over = "–" if time is None or bare is None else f"{bare / time:.2f}"
            answers += ["–" if time is None else duration(time), over]
        cells.append([name, duration(row["step_us"]), *ratios, peak, *answers])
    return shown + markdown.table(HEADER, cells)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure one model, and write e2e-<model>.json and .md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks e2e", description=__doc__.splitlines()[0])
    sizes = ("demo", *models.SIZES)
    parser.add_argument("--model", default="demo", choices=sizes, help="the shipped base or a random LLaVA")
    parser.add_argument("--stream", default="trigap", help="ranks of the experts (default: trigap)")
    parser.add_argument(
        "--variants", nargs="+", default=list(BUILDERS), choices=list(BUILDERS), metavar="NAME"
    )
    parser.add_argument("--samples", type=int, default=8, help="rows of a batch (default: 8)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens generated a prompt (default: 32)")
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(DTYPES))
    parser.add_argument("--seconds", type=float, default=3.0, help="for each variant and measurement")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: by machine)")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    out = arguments.out or machine.results_folder() / machine.machine_name(device)
    out.mkdir(parents=True, exist_ok=True)
    dtype, samples = DTYPES[arguments.dtype], arguments.samples
    if arguments.model == "demo":
        work = models.demo(device, dtype, samples)
    else:
        work = models.random_llava(models.SIZES[arguments.model], device, dtype, samples, routed=True)
    settings = {name: getattr(arguments, name) for name in ("model", "stream", "samples", "tokens", "dtype")}
    limits = Limits(arguments.seconds, 3, 30)
    variants = built(work, arguments.stream, arguments.variants)
    rows = measure(work, variants, device, arguments.tokens, limits)
    found = {"environment": machine.environment(device), "settings": settings, "rows": rows}
    name = f"e2e-{arguments.model}"
    for variant, row in rows.items():
        if "captured_failed" in row:
            print(f"{variant}: no captured token: {row['captured_failed']}")
    (out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / f"{name}.md").write_text("\n".join(lines(found)) + "\n")
    print("\n".join(lines(found)))
    return 0
