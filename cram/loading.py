"""Models, processors and encoders from a folder or a name, the same way for every family.

Processors are built without their video part: it needs torchvision, which this package never requires, and
task streams hold images only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cram.base import base_folder
from cram.families import FAMILIES
from cram.routing.clip import ClipEncoder, check_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PAPER_CLIP = "openai/clip-vit-large-patch14-336"
BUILTIN = "builtin"


@dataclass(frozen=True)
class Sources:
    """Where a model and the CLIP that routes come from: folders or names, or "builtin" for the shipped base.

    Attributes:
        model: The multimodal model.
        clip: None stands for the base's own CLIP with the built-in base, else for the paper's.
        dtype: See `load_model`.
    """

    model: str
    clip: str | None = None
    dtype: str = "float32"

    def load(self, device: str | None = None) -> tuple[nn.Module, Any, ClipEncoder]:
        """Load the model, its processor and the encoder; see `load_model` for what may be raised."""
        model_source, clip_source = self.model, self.clip or PAPER_CLIP
        if self.model == BUILTIN:
            model_source = str(base_folder() / "llava")
        if (self.clip or self.model) == BUILTIN:
            clip_source = BUILTIN
        model = load_model(model_source, self.dtype, device)
        return model, load_processor(model_source), load_encoder(clip_source, model)


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
    from transformers import AutoConfig

    found: str = AutoConfig.from_pretrained(str(source)).model_type
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
        source: A folder, a name, or "builtin" for the CLIP of the shipped base, its name on every machine.
        model: The multimodal model, or None for a CLIP of its own.
    """
    if str(source) != BUILTIN:
        return ClipEncoder.from_pretrained(str(source), model=model)
    encoder = ClipEncoder.from_pretrained(str(base_folder() / "clip"), model=model)
    encoder.source = BUILTIN
    return encoder
