"""The shipped base under the names that vLLM wants."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cram.base import base_folder
from cram.cli import main
from cram.serve.vllm import command
from cram.serve.vllm.base import check_checkpoint, published_base
from tests.cram import factories
from tests.cram.serve.vllm.bundles import small_bundle


def test_the_copy_has_the_same_values_in_float32_under_published_names(tmp_path: Path) -> None:
    folder = published_base(tmp_path)
    own, copy = (load_file(place / "model.safetensors") for place in (base_folder() / "llava", folder))
    assert len(copy) == len(own) and not any(name.startswith("vision_tower.embeddings") for name in copy)
    for name, tensor in own.items():
        published = copy[name.replace("vision_tower.", "vision_tower.vision_model.")]
        assert published.dtype == torch.float32 and torch.equal(published, tensor.float())
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    files = {file.name for file in (base_folder() / "llava").iterdir()}
    assert files == {file.name for file in folder.iterdir()}
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert published_base(tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


def test_the_command_compares_and_serves_the_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_bundle(tmp_path / "bundle")
    compared: list[Any] = []
    monkeypatch.setattr(command, "check_checkpoint", lambda *given: compared.extend(given))
    words = ["serve", "--engine", "vllm", "--model", "builtin", "--bundle", str(tmp_path / "bundle")]
    assert main([*words, "--dtype", "float32", "--print"]) == 0
    said = capsys.readouterr().out
    (copy,) = (tmp_path / "bundle-vllm").glob("base-*")
    assert compared == [str(copy), tmp_path / "bundle", None]
    assert f"vllm serve {copy} " in said and said.rstrip().endswith("--dtype float32")
    assert f"CRAM_CLIP={base_folder() / 'clip'}" in said


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bundle`; its base as `float32` and as `bfloat16`; `other`, a base of the same shape."""
    folder = tmp_path_factory.mktemp("place")
    small_bundle(folder / "bundle")
    for dtype in ("float32", "bfloat16"):
        model = factories.llava(clip=factories.clip_model())
        model.to(getattr(torch, dtype)).save_pretrained(folder / dtype)
    factories.llava(seed=1, clip=factories.clip_model()).save_pretrained(folder / "other")
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_is_taken_in_the_precision_of_its_files(place: Path, dtype: str) -> None:
    check_checkpoint(place / dtype, place / "bundle")


def test_another_base_of_the_same_shape_is_refused(place: Path) -> None:
    with pytest.raises(ValueError, match=r"model must be the base that .*bundle was trained on, got other"):
        check_checkpoint(place / "other", place / "bundle")


def test_of_a_quantised_base_nothing_is_compared(place: Path, tmp_path: Path) -> None:
    config = json.loads((place / "other/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    check_checkpoint(tmp_path, place / "bundle")


def test_a_revision_must_be_a_folder(place: Path) -> None:
    check_checkpoint(place / "float32", place / "bundle", "main")
    with pytest.raises(ValueError, match="model must be a folder where --revision is given"):
        check_checkpoint("someone/model", place / "bundle", "main")
