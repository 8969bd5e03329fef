"""The second base: real ImageNet features, a small language model, and a text tower that sees formats."""

from __future__ import annotations

from pathlib import Path

from cram.base import checked

ASSETS = Path(__file__).parent / "assets"


def real_base_folder() -> Path:
    """Return the folder with `llava/` (model, tokenizer, processor) and `clip/` (text tower, projection).

    Raises:
        FileNotFoundError: If the package was installed without its data.
    """
    return checked(ASSETS, "the base builtin-real", "cram.base.real.train")
