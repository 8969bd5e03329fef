"""The CLIP that a bundle names: found on another machine, or an error that says what to give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import cram
import cram.loading
from cram.bundle.format import describe
from cram.loading import Sources, load_encoder, load_model
from tests.cram import factories


def saved(folder: Path, encoder: Any, model: Any) -> Path:
    """A bundle without experts."""
    cram.attach(model, cram.CramConfig(), encoder)
    cram.save(model, folder)
    return folder


def test_the_shipped_clip_has_one_name_on_every_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("here", "there"):
        factories.save_all(tmp_path / place)
    monkeypatch.setattr(cram.loading, "base_folder", lambda: tmp_path / "here")
    model, _, encoder = Sources("builtin").load("cpu")
    bundle = saved(tmp_path / "bundle", encoder, model)
    assert json.loads((bundle / "cram.json").read_text())["encoder"]["source"] == "builtin"
    assert str(tmp_path) not in (bundle / "cram.json").read_text()
    monkeypatch.setattr(cram.loading, "base_folder", lambda: tmp_path / "there")
    loaded = cram.load(load_model(tmp_path / "there/llava", device="cpu"), bundle)
    texts = ["Which?"]
    assert torch.equal(loaded.encoder.encode_text(texts), encoder.encode_text(texts))


def test_a_clip_that_is_not_here_is_an_error_that_names_the_argument(tmp_path: Path) -> None:
    factories.save_all(tmp_path / "base")
    (tmp_path / "base/clip").rename(tmp_path / "moved")
    model = load_model(tmp_path / "base/llava", device="cpu")
    encoder = load_encoder(tmp_path / "moved", model)
    bundle = saved(tmp_path / "bundle", encoder, model)
    (tmp_path / "moved").rename(tmp_path / "base/clip")
    other = load_model(tmp_path / "base/llava", device="cpu")
    with pytest.raises(
        ValueError, match=r"must be at '.*moved', got none there; give the same CLIP as .encoder="
    ):
        cram.load(other, bundle)
    assert not hasattr(other, "cram")
    cram.load(other, bundle, load_encoder(tmp_path / "base/clip", other))


def test_another_clip_of_the_same_size_is_refused(tmp_path: Path) -> None:
    model = factories.llava()
    bundle = saved(tmp_path / "bundle", factories.clip_encoder(), model)
    stranger = factories.clip_encoder(clip=factories.clip_model(seed=8))
    with pytest.raises(ValueError, match=r"must be the CLIP that .* was trained with .*, got other"):
        cram.load(factories.llava(), bundle, stranger)
    file = bundle / "cram.json"
    assert json.loads(file.read_text())["encoder"]["sha256"] == factories.clip_encoder().sha256
    cram.load(factories.llava(), bundle, factories.clip_encoder())


@pytest.mark.parametrize(
    "part", ["vision_model.encoder.layers.0.mlp.fc1.weight", "text_model.encoder.layers.1.mlp.fc2.bias"]
)
def test_a_clip_with_one_other_weight_is_refused(part: str, tmp_path: Path) -> None:
    bundle = saved(tmp_path / "bundle", factories.clip_encoder(), factories.llava())
    clip = factories.clip_model()
    with torch.no_grad():
        clip.get_parameter(part).add_(0.02)
    model = factories.llava()
    with pytest.raises(ValueError, match=rf"got other weights from .* in {part.replace('_model', '')}"):
        cram.load(model, bundle, factories.clip_encoder(clip=clip))
    assert not hasattr(model, "cram")


def test_a_reused_tower_in_bfloat16_is_the_same_clip(tmp_path: Path) -> None:
    bundle = saved(
        tmp_path / "bundle", factories.clip_encoder(), factories.llava(clip=factories.clip_model())
    )
    model = factories.llava(clip=factories.clip_model()).to(torch.bfloat16)
    encoder = factories.clip_encoder(model)
    assert encoder.reuses_vision_tower
    cram.load(model, bundle, encoder)


def test_bundles_before_format_4_have_no_values_of_their_clip(tmp_path: Path) -> None:
    folder = Path(__file__).parent / "format3" / "cram"
    model, encoder = factories.fresh()
    assert describe(folder).encoder["values"] == {}
    cram.load(model, folder, encoder)
    with torch.no_grad():
        encoder._projection.weight.add_(0.1)
    with pytest.raises(ValueError, match="must be the CLIP that"):
        cram.load(factories.llava(clip=factories.clip_model()), folder, encoder)
