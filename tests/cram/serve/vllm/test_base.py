"""The shipped base under the names that vLLM wants."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cram.base import base_folder
from cram.cli import main
from cram.serve.vllm.base import published_base
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


def test_the_command_serves_the_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_bundle(tmp_path / "bundle")
    words = ["serve", "--engine", "vllm", "--model", "builtin", "--bundle", str(tmp_path / "bundle")]
    assert main([*words, "--dtype", "float32", "--print"]) == 0
    said = capsys.readouterr().out
    (copy,) = (tmp_path / "bundle-vllm").glob("base-*")
    assert f"vllm serve {copy} " in said and said.rstrip().endswith("--dtype float32")
    assert f"CRAM_CLIP={base_folder() / 'clip'}" in said
