"""Models, encoders and processors from folders that are whole, and from folders that are not."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, CLIPTextModel, Qwen2VLImageProcessor

from cram.loading import _image_text_class, load_encoder, load_model, load_processor, shipped_folder
from tests.cram import factories

WEIGHTS = "model.safetensors"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return factories.save_all(tmp_path)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Rewrites the weights of a folder."""
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def without(part: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda weights: {name: value for name, value in weights.items() if part not in name}


def renamed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("k_proj", "key"): value for name, value in weights.items()}


def reshaped(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value[:-1].clone() if "fc1.bias" in name else value for name, value in weights.items()}


@pytest.mark.parametrize("name", list(factories.MODELS))
def test_whole_folders_load(place: Path, name: str) -> None:
    model = load_model(place / name, device="cpu")
    expected = factories.MODELS[name](**({"clip": factories.clip_model()} if name == "llava" else {}))
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in model.state_dict().items())
    assert load_encoder(place / "clip", model).reuses_vision_tower == (name == "llava")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("layers.1."), r"got \d+ missing: .*layers\.1\..*, \.\.\.$"),
        (renamed, r"\d+ missing: .*k_proj.*; \d+ unexpected: .*key"),
        (lambda weights: {**weights, "left.over": torch.zeros(2)}, "got 1 unexpected: .*left.over"),
        (reshaped, "of another shape"),
    ],
    ids=["lost", "renamed", "left_over", "reshaped"],
)
@pytest.mark.parametrize("part", ["llava", "clip"])
def test_weights_that_are_not_the_models_are_refused(
    place: Path, part: str, change: Any, message: str
) -> None:
    edit(place / part, change)
    with pytest.raises(
        (ValueError, RuntimeError), match="another shape|ismatch" if change is reshaped else message
    ):
        load_model(place / part, device="cpu") if part == "llava" else load_encoder(
            place / part, factories.llava()
        )


def test_a_folder_that_is_no_clip_is_refused(place: Path) -> None:
    with pytest.raises(
        ValueError, match="encoder must be a CLIP with both towers, got a model of type 'llava'"
    ):
        load_encoder(place / "llava", factories.llava())
    CLIPTextModel(factories.clip_model().config.text_config).save_pretrained(place / "text")
    with pytest.raises(ValueError, match="got a model of type 'clip_text_model'"):
        load_encoder(place / "text", factories.llava())


def test_the_encoder_of_a_shipped_base_has_its_name() -> None:
    assert load_encoder("builtin").source == "builtin"
    with pytest.raises(ValueError, match="model must be given for the encoder 'builtin-real'"):
        load_encoder("builtin-real")
    found = load_encoder("builtin-real", load_model(shipped_folder("builtin-real") / "llava", device="cpu"))
    assert found.source == "builtin-real" and found.reuses_vision_tower


def test_a_processor_without_a_patch_size_is_refused(place: Path) -> None:
    assert load_processor(place / "llava").patch_size == factories.PATCH
    file = place / "llava/processor_config.json"
    values = json.loads(file.read_text())
    del values["patch_size"]
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="processor must have a patch_size, got None"):
        load_processor(place / "llava")


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))], ids=["copy", "pickle"]
)
def test_a_processor_without_its_video_part_is_copied(copied: Any) -> None:
    kind = _image_text_class("Qwen2_5_VLProcessor")
    assert kind.get_attributes() == ["image_processor", "tokenizer"]
    twin = copied(kind(Qwen2VLImageProcessor(), factories.tokenizer()))
    assert type(twin) is kind
    assert twin.tokenizer("ab")["input_ids"] == factories.tokenizer()("ab")["input_ids"]


@pytest.mark.parametrize(("load", "what"), [(load_model, "model"), (load_encoder, "encoder")])
def test_a_name_that_cannot_be_loaded_is_named(
    load: Callable[[str], Any], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What transformers says without a network names the hub alone."""

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise OSError("We couldn't connect to the hub.\nCheck your internet connection.")

    monkeypatch.setattr(AutoConfig, "from_pretrained", unreachable)
    expected = f"{what} must be a folder, .* got 'someone/big-model': We couldn't connect to the hub.$"
    with pytest.raises(OSError, match=expected):
        load("someone/big-model")
