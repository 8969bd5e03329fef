"""Variants of one whole model that share its weights: bare, and with adapters of this and other packages."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baselines.loops import Released
from benchmarks.cases import ranks_named
from benchmarks.models import Work, shared_copy

PROJECTIONS = r".*language_model\.layers\.\d+\.self_attn\.[qkvo]_proj"
DROPOUT, UP_SCALE = 0.05, 0.01
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
