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
from cram.model.frozen.identity import check_base_values
from tests.cram.factories import clip_encoder, clip_model, llava, routed_llava


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A saved bundle of a tiny LLaVA."""
    model, _, _ = routed_llava()
    save(model, tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_base_is_known_in_every_precision(bundle: Path, dtype: torch.dtype) -> None:
    assert load(llava(clip=clip_model()).to(dtype), bundle, clip_encoder()).num_experts == 3


def scaled(weight: torch.Tensor) -> None:
    """Change a weight as a short training does."""
    with torch.no_grad():
        weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))


# What decides an answer, part by part.
PARTS = (
    "model.language_model.layers.0.self_attn.q_proj.weight",
    "model.language_model.layers.1.self_attn.o_proj.weight",
    "model.language_model.layers.1.mlp.down_proj.weight",
    "model.language_model.norm.weight",
    "model.language_model.embed_tokens.weight",
    "model.multi_modal_projector.linear_1.bias",
    "model.vision_tower.encoder.layers.0.mlp.fc1.weight",
    "lm_head.weight",
)


@pytest.mark.parametrize("part", PARTS)
def test_a_base_that_was_trained_further_is_refused_and_stays_as_it_was(bundle: Path, part: str) -> None:
    model = llava(clip=clip_model())
    scaled(model.get_parameter(part))
    with pytest.raises(
        ValueError,
        match=rf"model must be the base that .*bundle was trained on, got other weights in {part}$",
    ):
        load(model, bundle, clip_encoder())
    with pytest.raises(ValueError, match="attach"):
        attached(model)


def test_an_attached_base_is_compared_too(bundle: Path) -> None:
    model, _, cram = routed_llava()
    cram.set_experts([], [], 0)
    scaled(model.model.multi_modal_projector.linear_2.weight)
    with pytest.raises(ValueError, match=r"other weights in model\.multi_modal_projector\.linear_2\.weight"):
        load(model, bundle)


def test_the_values_at_attach_stay_when_the_weights_are_out_of_reach() -> None:
    model, _, cram = routed_llava()
    values = cram.base_values
    for layer in model.model.language_model.layers:
        layer.self_attn.to("meta")
    assert len(values) == len(llava().state_dict()) and cram.base_values == values


def rewritten(bundle: Path, change: Any) -> None:
    """Change the description of a bundle, as one who also corrects the manifest would."""
    file = bundle / DESCRIPTION
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["files"][DESCRIPTION] = fingerprint(file)
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def made_anew(cls: type) -> Any:
    raise TypeError("a sharded module is initialised when it is made")


def test_a_sharded_layer_is_not_made_again_to_read_its_weights() -> None:
    model, _, cram = routed_llava()
    values = cram.base_values
    for layer in model.model.language_model.layers:
        # FSDP gives a layer another class, which makes and initialises the original one.
        layer.__class__ = type("Sharded", (type(layer),), {"__new__": made_anew})
    assert cram.base_values == values


def test_the_rounding_that_is_allowed_is_a_share_of_the_bundle_s_value() -> None:
    share, folder = 2.0**-7, Path("folder")
    check_base_values({"weight": [1.0]}, {"weight": [1 + share]}, folder)
    with pytest.raises(ValueError, match="got other weights in weight$"):
        # This is within the same share of the model's own value.
        check_base_values({"weight": [1.0]}, {"weight": [1 + 1.005 * share]}, folder)


def test_weights_of_other_names_are_not_compared(bundle: Path) -> None:
    rewritten(bundle, lambda data: data.update(base_values={"model.renamed.weight": [1.0]}))
    assert load(llava(clip=clip_model()), bundle, clip_encoder()).num_experts == 3


WRONG = ([], [0.0] * 3, ["1"] * 16, [None] * 16, [1] * 16, [1e308] * 16, {}, 1.0)


@pytest.mark.parametrize("values", WRONG)
def test_values_of_another_kind_are_refused(bundle: Path, values: Any) -> None:
    rewritten(bundle, lambda data: data.update(base_values={PARTS[0]: values}))
    with pytest.raises(ValueError, match="base"):
        load(llava(clip=clip_model()), bundle, clip_encoder())


@pytest.mark.parametrize("values", [None, [0.0] * 256, 1])
def test_values_must_be_an_object(bundle: Path, values: Any) -> None:
    rewritten(bundle, lambda data: data.update(base_values=values))
    with pytest.raises(ValueError, match="base_values must be a dict"):
        load(llava(clip=clip_model()), bundle, clip_encoder())
