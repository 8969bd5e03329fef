"""Models, processors and encoders from a folder or a name, the same way for every family.

Processors are built without their video part: it needs torchvision, which this package never requires, and
task streams hold images only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cram.base import base_folder
from cram.base.real import real_base_folder
from cram.families import FAMILIES
from cram.routing.clip import ClipEncoder, check_weights, load_config, load_image_processor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PAPER_CLIP = "openai/clip-vit-large-patch14-336"
BUILTIN, BUILTIN_REAL = "builtin", "builtin-real"
SHIPPED = (BUILTIN, BUILTIN_REAL)
PARTS = "cram_routing"  # model type of an encoder that has its vision tower from the model


@dataclass(frozen=True)
class Sources:
    """Where a model and the CLIP that routes come from: folders or names, or a shipped base by its name.

    Attributes:
        model: The multimodal model; "builtin" and "builtin-real" are the shipped bases.
        clip: None stands for a shipped base's own encoder, and for the paper's CLIP with any other model.
        dtype: See `load_model`.
    """

    model: str
    clip: str | None = None
    dtype: str = "float32"

    def load(self, device: str | None = None) -> tuple[nn.Module, Any, ClipEncoder]:
        """Load the model, its processor and the encoder; see `load_model` for what may be raised."""
        shipped = self.model in SHIPPED
        model_source = str(shipped_folder(self.model) / "llava") if shipped else self.model
        clip_source = self.clip or (self.model if shipped else PAPER_CLIP)
        model = load_model(model_source, self.dtype, device)
        return model, load_processor(model_source), load_encoder(clip_source, model)


def shipped_folder(name: str) -> Path:
    """The folder of a shipped base: `llava/` with the model, `clip/` with the encoder.

    Raises:
        ValueError: If no base of that name is shipped.
        FileNotFoundError: If the package was installed without its data.
    """
    if name not in SHIPPED:
        raise ValueError(f"base must be one of {SHIPPED}, got {name!r}")
    return base_folder() if name == BUILTIN else real_base_folder()


def load_model(source: str | Path, dtype: str = "float32", device: str | None = None) -> nn.Module:
    """Load a multimodal model in evaluation mode.

    Args:
        source: A folder or a name that transformers resolves.
        dtype: "float32", "bfloat16" or "float16".
        device: Where to; by default a CUDA device if there is one, else the CPU.

    Raises:
        ValueError: If the model's family or `dtype` is not known, or its folder has not exactly its weights.
        OSError: If there is no model at `source`.
    """
    from transformers import AutoModelForImageTextToText

    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {dtype!r}")
    model_type(source)
    model: nn.Module
    model, report = AutoModelForImageTextToText.from_pretrained(
        str(source), dtype=DTYPES[dtype], output_loading_info=True
    )
    check_weights(source, report)
    return model.to(device or default_device()).eval()


def default_device() -> str:
    """The name "cuda" if there is a CUDA device, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def model_type(source: str | Path) -> str:
    """The family of the model at `source`, from its config alone.

    Raises:
        ValueError: If the family is not known.
        OSError: If there is no model at `source`.
    """
    from cram.base.real.tower import register_tower

    register_tower()
    found: str = load_config(source, "model").model_type
    if found not in FAMILIES:
        raise ValueError(f"model must be of a family among {sorted(FAMILIES)}, got {found!r} at {source}")
    return found


def load_processor(source: str | Path) -> Any:
    """Load the processor (tokenizer, image processor, chat template) of a model, without its video part.

    Raises:
        ValueError: If the processor lacks the size of a patch, without which it cannot count image tokens.
        OSError: If there is no processor at `source`.
    """
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    name = PROCESSOR_MAPPING_NAMES[model_type(source)]
    processor = _image_text_class(name).from_pretrained(str(source))
    if getattr(processor, "patch_size", 1) is None:
        raise ValueError(
            f"processor must have a patch_size, got None at {source}; set that of the vision tower in "
            "processor_config.json"
        )
    return processor


@cache
def _image_text_class(name: str) -> Any:
    """The named processor class, or where it has a video part a subclass without it."""
    import transformers

    base: Any = getattr(transformers, name)
    if "video_processor" not in base.get_attributes():
        return base

    class ImageTextProcessor(base):
        """A processor without a video part."""

        @classmethod
        def get_attributes(cls) -> list[str]:
            """Names of the parts that are loaded and called."""
            return [part for part in super().get_attributes() if part != "video_processor"]

        def __reduce__(self) -> tuple[Any, ...]:
            """Pickles name the original class, because this one has no name in a module."""
            return _blank_processor, (name,), self.__dict__

    ImageTextProcessor.__name__ = name
    return ImageTextProcessor


def _blank_processor(name: str) -> Any:
    kind = _image_text_class(name)
    return kind.__new__(kind)


def load_encoder(source: str | Path, model: nn.Module | None = None) -> ClipEncoder:
    """Load the CLIP that routes; it reads the model's own vision tower where the two are the same network.

    Args:
        source: A folder, a name, or the name of a shipped base, which is the same on every machine.
        model: The multimodal model, or None for a CLIP of its own.

    Raises:
        ValueError: If the shipped base's encoder reads the model's tower, and there is no model.
    """
    name = str(source)
    folder = shipped_folder(name) / "clip" if name in SHIPPED else Path(name)
    if _is_in_parts(folder):
        if model is None:
            raise ValueError(
                f"model must be given for the encoder {name!r}, which reads its vision tower, got none"
            )
        encoder = _encoder_of_parts(folder.parent, model)
    else:
        found = str(folder) if name in SHIPPED else name
        encoder = ClipEncoder.from_pretrained(found, model=model)
    encoder.source = name
    return encoder


def _is_in_parts(folder: Path) -> bool:
    """Whether a folder holds the encoder of a base that `cram.base.real.train` made, beside its `llava`."""
    file = folder / "config.json"
    try:
        kind = json.loads(file.read_text(encoding="utf-8")).get("model_type") if file.is_file() else None
    except (ValueError, AttributeError):
        kind = None
    return kind == PARTS and (folder.parent / "llava").is_dir()


def _encoder_of_parts(folder: Path, model: nn.Module) -> ClipEncoder:
    """The encoder whose towers are not a `CLIPModel` of transformers."""
    from transformers import PreTrainedTokenizerFast

    from cram.base.real.model import load_routing

    routing, report = load_routing(folder)
    check_weights(folder / "clip", report)
    routing.to(next(model.parameters()).device)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "clip")
    return ClipEncoder(routing, tokenizer, load_image_processor(str(folder / "clip")), model)
