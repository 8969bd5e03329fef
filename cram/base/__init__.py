"""The built-in base: a tiny LLaVA and the CLIP that routes for it. `assets/` holds both as checkpoints."""

from __future__ import annotations

from pathlib import Path

_ASSETS = Path(__file__).parent / "assets"


def base_folder() -> Path:
    """Return the folder with `llava/` (model, tokenizer, processor) and `clip/` (text and image towers).

    Raises:
        FileNotFoundError: If the package was installed without its data.
    """
    for part in ("llava", "clip"):
        if not (_ASSETS / part / "model.safetensors").is_file():
            raise FileNotFoundError(
                f"the built-in base must lie in {_ASSETS / part}, got no model.safetensors there; "
                "reinstall the package or train it with `python -m cram.base.pretrain`"
            )
    return _ASSETS
