"""The CLIP that a bundle routes with: found by its name, and told from others by its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from cram.bundle.format import Description
from cram.loading import load_encoder
from cram.routing.clip import ClipEncoder
from cram.values import differing

NAMES_SHOWN = 3


def check_encoder(encoder: Any, description: Description, folder: Path) -> None:
    """Refuse an encoder that a bundle was not trained with.

    Args:
        encoder: The encoder.
        description: What the bundle says.
        folder: The bundle, for the message.

    Raises:
        ValueError: If its widths or its weights are others.
    """
    for name in ("text_dim", "image_dim"):
        if getattr(encoder, name) != (wanted := description.encoder[name]):
            raise ValueError(
                f"{name} of the encoder must be {wanted} as in {folder}, got {getattr(encoder, name)}"
            )
    wanted = description.encoder.get("sha256")
    far = differing(description.encoder["values"], encoder.values) if description.encoder["values"] else []
    if wanted not in (None, encoder.sha256) or far:
        where = f" in {', '.join(far[:NAMES_SHOWN])}" if far else ""
        raise ValueError(
            f"encoder must be the CLIP that {folder} was trained with "
            f"({description.encoder['source']!r}), got other weights from {encoder.source!r}{where}"
        )


def named_encoder(description: Description, model: nn.Module | None = None) -> ClipEncoder:
    """Load the CLIP that a bundle names.

    Args:
        description: What the bundle says.
        model: See `load_encoder`.

    Raises:
        ValueError: If the bundle names none, or there is none at that place.
    """
    source = description.encoder["source"]
    if not source:
        raise ValueError("encoder must be given: the bundle does not name the CLIP it was trained with")
    try:
        return load_encoder(source, model)
    except OSError as error:
        raise ValueError(
            f"the CLIP that the bundle names must be at {source!r}, got none there; give the same CLIP as "
            "`encoder=` (in commands --clip)"
        ) from error
