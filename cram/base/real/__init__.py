"""The second base: real ImageNet features, a small language model, and a text tower that sees formats."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"


def real_base_folder() -> Path:
    """Return the folder with `llava/` (model, tokenizer, processor) and `clip/` (text tower, projection).

    Raises:
        FileNotFoundError: If the package was installed without its data.
    """
    for part in ("llava", "clip"):
        if not (ASSETS / part / "model.safetensors").is_file():
            raise FileNotFoundError(
                f"the base builtin-real must lie in {ASSETS / part}, got no model.safetensors there; "
                "reinstall the package or train it with `python -m cram.base.real.train`"
            )
    return ASSETS
