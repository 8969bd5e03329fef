"""What tests need of the installed transformers."""

from __future__ import annotations

import inspect

import pytest
from transformers import LlavaForConditionalGeneration

AHEAD = pytest.mark.skipif(
    "mm_encoder_outputs" not in inspect.signature(LlavaForConditionalGeneration.forward).parameters,
    reason="this transformers takes no image features that were computed ahead",
)
