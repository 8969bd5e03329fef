"""A whole model: a training step and generated tokens with CRAM, PEFT, the released loop, and bare.

All variants share the base's weights and run interleaved. A step is forward, backward and AdamW on what the
variant trains; the bare model's goes back to its input embeddings. PEFT's adapters are in the model's dtype,
which favours them; CRAM's are float32, as it keeps them. CRAM routes by itself: with the CLIP of the shipped
base, and on a random LLaVA with a random CLIP. Before every prompt it forgets the texts that this CLIP has
seen, so that every request counts as new.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import machine, markdown, models
from benchmarks.baselines.loops import Released
from benchmarks.cases import DTYPES, ranks_named
from benchmarks.models import Work, shared_copy
from benchmarks.report import duration
from benchmarks.timing import Limits, Sampler, interleaved

PROJECTIONS = r".*language_model\.layers\.\d+\.self_attn\.[qkvo]_proj"
DROPOUT, UP_SCALE = 0.05, 0.01
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
)
Factors = dict[str, list[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Variant:
    """A model with its adapters.

    Attributes:
        model: Shares the base's weights with the other variants.
        parameters: The optimiser's parameters.
        around: Context of every forward.
        extra_loss: Added to the loss, or None.
        forget: Called before every prompt.
    """

    model: Any
    parameters: list[nn.Parameter]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    extra_loss: Callable[[], Tensor] | None = None
    forget: Callable[[], Any] = lambda: None


class _GatedLinear(nn.Module):
    """The released layer with its gates [E] at hand."""

    def __init__(self, base: nn.Linear, factors: Sequence[tuple[Tensor, Tensor]], gates: Tensor) -> None:
        super().__init__()
        dtype = base.weight.dtype
        a, b = ([pair[i].to(dtype) for pair in factors] for i in range(2))
        self.released = Released(base.weight, base.bias, a, b, DROPOUT)
        self.register_buffer("gates", gates.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.released(x, self.gates)


def draw_factors(work: Work, ranks: Sequence[int]) -> Factors:
    """Return random experts of every adapted linear by module path."""
    from cram.families import family_of, match_linears

    generator = torch.Generator().manual_seed(0)
    matched = match_linears(work.model, family_of(work.model), tuple(f"{letter}_proj" for letter in "qkvo"))
    found: Factors = {}
    for path, (_, linear) in matched.modules.items():
        (d_out, d_in), device = linear.weight.shape, linear.weight.device
        found[path] = [
            (
                (torch.randn(r, d_in, generator=generator) / d_in**0.5).to(device),
                (torch.randn(d_out, r, generator=generator) * UP_SCALE).to(device),
            )
            for r in ranks
        ]
    return found


def bare(work: Work, factors: Factors) -> Variant:
    """No adapters. Gradients go back to the input embeddings."""
    model = shared_copy(work.model)
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: output.requires_grad_() if torch.is_grad_enabled() else None
    )
    return Variant(model, [])


def peft(work: Work, factors: Factors, rank: int | None = None) -> Variant:
    """One PEFT LoRA of the experts' total rank, or of `rank`."""
    from peft import LoraConfig, inject_adapter_in_model

    r = rank or sum(len(a) for a, _ in next(iter(factors.values())))
    config = LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=DROPOUT, target_modules=PROJECTIONS)
    model = inject_adapter_in_model(config, shared_copy(work.model))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(work.model.dtype)
    return Variant(model, [p for p in model.parameters() if p.requires_grad])


def released(work: Work, factors: Factors) -> Variant:
    """The authors' loop in every adapted linear, with even gates."""
    model, parameters = shared_copy(work.model), []
    for path, pairs in factors.items():
        gates = torch.full((len(pairs),), 1 / len(pairs), device=work.model.device)
        layer = _GatedLinear(model.get_submodule(path), pairs, gates).train(model.training)
        model.set_submodule(path, layer)
        parameters += [layer.released.slots_a, layer.released.slots_b]
    return Variant(model, parameters)


def cram(work: Work, factors: Factors, penalty: bool = False) -> Variant:
    """This package. It routes if the encoder can; otherwise gates are even."""
    from cram import CramConfig, attach

    model = shared_copy(work.model)
    handle = attach(model, CramConfig(dropout=DROPOUT), work.encoder, work.processor)
    count = len(next(iter(factors.values())))
    centroids = torch.randn(count, handle.encoder.image_dim)
    if work.routed:
        query = _query(handle, model, work)
        handle.method.router.groups.observe("task", query.text)
        centroids = query.image.mean(0) + 0.1 * centroids.to(query.image.device)
    for e in range(count):
        weights = {path: pairs[e] for path, pairs in factors.items()}
        handle.method.add_expert(f"expert{e}", weights, 0, centroids[e], trained=e == count - 1)
    extra = None
    if penalty:
        handle.method.prepare_penalty()
        extra = partial(_penalty_of_last_forward, handle)

    even = torch.full((count,), 1 / count)
    around = partial(handle.method.training_group, 0) if work.routed else partial(handle.fixed, even)
    # Moving an encoder to where it is empties its cache of texts.
    forget = partial(handle.encoder.to, work.model.device) if work.routed else Variant.forget
    return Variant(model, handle.trainable_parameters(), around, extra, forget)


def _penalty_of_last_forward(handle: Any) -> Tensor:
    return handle.method.penalty(handle.state)


def _query(handle: Any, model: Any, work: Work) -> Any:
    """Return the automatic query of the prompts."""
    found: list[Any] = []
    handle.hooks.on_query.append(found.append)
    with torch.no_grad():
        model(**work.prompt, use_cache=False, logits_to_keep=1)
    handle.hooks.on_query.remove(found.append)
    return found[0]


BUILDERS: dict[str, Callable[[Work, Factors], Variant]] = {
    "bare": bare,
    "released": released,
    "peft": peft,
    "peft-9": partial(peft, rank=9),
    "cram": cram,
    "cram with penalty": partial(cram, penalty=True),
}


def built(work: Work, stream: str, chosen: Collection[str] = BUILDERS) -> dict[str, Variant]:
    """Return the chosen variants, as far as this work allows."""
    factors = draw_factors(work, ranks_named(stream))
    # The penalty needs the query's shares.
    names = [n for n in BUILDERS if n in chosen and (work.routed or n != "cram with penalty")]
    return {name: BUILDERS[name](work, factors) for name in names}


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
    return {
        name: {
            "step_us": trained[name],
            "peak_bytes": peaks[name],
            "prompt_us": answered.get((name, 1)),
            "token_us": (answered[name, tokens + 1] - answered[name, 1]) / tokens if name in plain else None,
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
        answers = ["–"] * 4
        if row["token_us"] is not None:
            answers = []
            for figure in ("prompt_us", "token_us"):
                over = f"{rows['bare'][figure] / row[figure]:.2f}" if "bare" in rows else "–"
                answers += [duration(row[figure]), over]
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
    (out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / f"{name}.md").write_text("\n".join(lines(found)) + "\n")
    print("\n".join(lines(found)))
    return 0
