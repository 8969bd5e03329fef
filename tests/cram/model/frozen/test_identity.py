"""A bundle is loaded onto the base model that it was trained on, in whatever precision, and onto no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cram.attach import attached
from cram.bundle.bundle import load, save
from cram.bundle.format import DESCRIPTION, MANIFEST, fingerprint
from tests.cram.factories import clip_encoder, llava, routed_llava


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A saved bundle of a tiny LLaVA."""
    model, _, _ = routed_llava()
    save(model, tmp_path / "bundle")
    return tmp_path / "bundle"


def adapted(model: Any, layer: int) -> Any:
    """A weight that carries experts."""
    return model.model.language_model.layers[layer].self_attn.q_proj.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_base_is_known_in_every_precision(bundle: Path, dtype: torch.dtype) -> None:
    assert load(llava().to(dtype), bundle, clip_encoder()).num_experts == 3


@pytest.mark.parametrize("layer", [0, -1])
def test_a_base_that_was_trained_further_is_refused_and_stays_as_it_was(bundle: Path, layer: int) -> None:
    model = llava()
    last = model.model.language_model.layers[-1].self_attn.o_proj.weight
    weight = adapted(model, 0) if layer == 0 else last
    with torch.no_grad():
        weight.mul_(1 + 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match=r"model must be the base that .*bundle was trained on, got other"):
        load(model, bundle, clip_encoder())
    with pytest.raises(ValueError, match="attach"):
        attached(model)


def test_the_values_at_attach_stay_when_the_weights_are_out_of_reach() -> None:
    model, _, cram = routed_llava()
    values = cram.base_values
    for layer in model.model.language_model.layers:
        layer.self_attn.to("meta")
    assert values is not None and cram.base_values == values


def rewritten(bundle: Path, change: Any) -> None:
    """Change the description of a bundle, as one who also corrects the manifest would."""
    file = bundle / DESCRIPTION
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["files"][DESCRIPTION] = fingerprint(file)
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def test_a_bundle_without_values_is_taken(bundle: Path) -> None:
    rewritten(bundle, lambda data: data.pop("base_values"))
    model = llava()
    with torch.no_grad():
        adapted(model, 0).zero_()
    assert load(model, bundle, clip_encoder()).num_experts == 3


@pytest.mark.parametrize("values", [[], [0.0] * 3, ["1"] * 256, [None] * 256, [1] * 256, [1e308] * 256, {}])
def test_values_of_another_kind_are_refused(bundle: Path, values: Any) -> None:
    rewritten(bundle, lambda data: data.update(base_values=values))
    with pytest.raises(ValueError, match="base"):
        load(llava(), bundle, clip_encoder())
