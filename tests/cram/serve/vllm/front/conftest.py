"""The bundle and the router of the tests in this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from cram.serve.vllm.export import export_groups
from cram.serve.vllm.front.routing import BundleRouter
from tests.cram import factories
from tests.cram.serve.vllm.bundles import small_bundle


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bundle`, its export `out`, its base `base`, and the CLIP that routes in `clip`."""
    folder = tmp_path_factory.mktemp("place")
    small_bundle(folder / "bundle")
    export_groups(folder / "bundle", folder / "out")
    factories.save_clip(folder / "clip", factories.clip_model())
    factories.llava(clip=factories.clip_model()).save_pretrained(folder / "base")
    return folder


@pytest.fixture(scope="module")
def router(place: Path) -> BundleRouter:
    """The router of the bundle."""
    return BundleRouter.load(place / "bundle", place / "out", factories.clip_encoder())
