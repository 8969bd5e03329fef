"""Lets vLLM import its LLaVA where torchvision is absent; for tests alone."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec

MODULE = "transformers.models.pixtral.image_processing_pixtral"
TWIN = "transformers.models.pixtral.image_processing_pil_pixtral"


def register() -> None:
    """Put the twin in the module's place."""
    if find_spec("torchvision") is None:
        sys.modules.setdefault(MODULE, import_module(TWIN))
