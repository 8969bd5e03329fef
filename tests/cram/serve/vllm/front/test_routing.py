"""The router's CLIP: the one that the bundle names, and no other."""

from __future__ import annotations

from pathlib import Path

import pytest

import cram
import cram.loading
from cram.loading import BUILTIN
from cram.serve.vllm.export import export_groups
from cram.serve.vllm.front.routing import BundleRouter
from tests.cram import factories


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """`bundle`, its export `out`, and the CLIP that it was trained with in `clip`."""
    model, _, handle = factories.routed_llava()
    handle.encoder.source = BUILTIN
    cram.save(model, tmp_path / "bundle")
    export_groups(tmp_path / "bundle", tmp_path / "out")
    factories.save_clip(tmp_path / "clip", factories.clip_model())
    return tmp_path


def test_another_clip_than_that_of_the_bundle_is_refused(place: Path) -> None:
    stranger = factories.clip_encoder(clip=factories.clip_model(seed=8))
    with pytest.raises(ValueError, match="encoder must be the CLIP that .* was trained with"):
        BundleRouter.load(place / "bundle", place / "out", stranger)


def test_the_clip_that_the_bundle_names_is_loaded(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cram.loading, "base_folder", lambda: place)
    assert BundleRouter.load(place / "bundle", place / "out").encoder.source == BUILTIN
