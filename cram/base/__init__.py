"""The built-in base: a tiny LLaVA and the CLIP that routes for it. `assets/` holds both as checkpoints."""

from __future__ import annotations

from pathlib import Path

_ASSETS = Path(__file__).parent / "assets"


def base_folder() -> Path:
    """Return the folder with `llava/` (model, tokenizer, processor) and `clip/` (text and image towers).

    Raises:
        FileNotFoundError: If the package was installed without its data.
    """
    return checked(_ASSETS, "the built-in base", "cram.base.pretrain")


def checked(assets: Path, base: str, program: str) -> Path:
    """Return the folder of a base, which the module `program` trains.

    Raises:
        FileNotFoundError: If it lacks a checkpoint.
    """
    for part in ("llava", "clip"):
        if not (assets / part / "model.safetensors").is_file():
            raise FileNotFoundError(
                f"{base} must lie in {assets / part}, got no model.safetensors there; reinstall the package "
                f"or train it with `python -m {program}`"
            )
    return assets
