"""Lets vLLM process pictures for its LLaVA and Qwen-VL where torchvision is absent; for tests alone."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

# Modules of transformers that import torchvision, and their twins that do without.
TWINS = {
    "transformers.models.pixtral.image_processing_pixtral": "image_processing_pil_pixtral",
    "transformers.models.qwen2_vl.image_processing_qwen2_vl": "image_processing_pil_qwen2_vl",
}
VIDEO = "video_processor"


def register() -> None:
    """Put the twins in the modules' places, and leave out the processors of videos."""
    if find_spec("torchvision") is not None:
        return
    for module, twin in TWINS.items():
        package = module.rsplit(".", 1)[0]
        sys.modules.setdefault(module, import_module(f"{package}.{twin}"))
    leave_out_videos()


def leave_out_videos() -> None:
    """Load processors of transformers without their part for videos, which needs torchvision."""
    from transformers import ProcessorMixin
    from transformers.processing_utils import VideosKwargs

    original = ProcessorMixin.get_attributes.__func__

    def get_attributes(cls: Any) -> list[str]:
        return [part for part in original(cls) if part != VIDEO]

    ProcessorMixin.get_attributes = classmethod(get_attributes)
    # vLLM lists the arguments of the part even where a request may bring no video.
    setattr(ProcessorMixin, VIDEO, type("NoVideos", (), {"valid_kwargs": VideosKwargs}))
