"""Pictures as the model sees them: upright, in RGB with eight bits per channel, without transparency.

A conversion of Pillow alone changes what many pictures show: a photograph stays on its side, grey of 16 bits
is clipped to white, and what is transparent becomes black.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

# What has several frames and is no animation: the pages of a document.
_PAGED = ("TIFF",)
_SIXTEEN_BITS = "I;16"
_WIDE = {"I": "32-bit integers", "F": "floating-point numbers"}


def upright_rgb(image: Image.Image) -> Image.Image:
    """A picture in RGB.

    The orientation of EXIF is applied. Grey of 16 bits is scaled to 8. Transparency is composed on white. Of
    an animation the first frame is taken.

    Raises:
        ValueError: If the picture has no pixel, has several pages, or a channel has more than 16 bits.
        OSError: If its data cannot be decoded.
    """
    from PIL import Image, ImageOps

    if 0 in image.size:
        raise ValueError(f"must have pixels, got {image.width} x {image.height}")
    # The frames of an animation are counted by decoding them; a small file can hold half a million.
    if image.format in _PAGED and (pages := getattr(image, "n_frames", 1)) > 1:
        raise ValueError(f"must be one picture, got {pages} pages; save each page as a file")
    if image.mode in _WIDE:
        raise ValueError(f"must have 8 or 16 bits per channel, got {_WIDE[image.mode]}; scale it to 8 bits")
    turned = ImageOps.exif_transpose(image)
    if turned.mode.startswith(_SIXTEEN_BITS):
        values = np.asarray(turned)
        grey = (values.astype(np.float64) * (255 / 65535)).round().astype(np.uint8)
        grey[values == turned.info.get("transparency", -1)] = 255
        return Image.fromarray(grey).convert("RGB")
    if not turned.has_transparency_data:
        return turned.convert("RGB")
    shown = turned.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown).convert("RGB")
