"""Pictures as the model sees them: upright, in RGB with eight bits per channel, without transparency.

A conversion of Pillow alone changes what many pictures show: a photograph stays on its side, grey of 16 bits
is clipped to white, and what is transparent becomes black.

An opened image that is not decoded yet stays so. Its encoded bytes are opened anew for each use: memory stays
that of the bytes, and threads do not share the place in a file.
"""

from __future__ import annotations

import io
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

# Bytes of a picture's file at most: by pixel, and for whatever else it says.
MAX_PIXEL_BYTES, SPARE_BYTES = 4, 1 << 20

# What has several frames and is no animation: the pages of a document.
_PAGED = ("TIFF",)
_SIXTEEN_BITS = "I;16"
_WIDE = {"I": "32-bit integers", "F": "floating-point numbers"}
# Held while an image that others may hold too is read or changed.
_SHARED = threading.Lock()


@dataclass(frozen=True)
class Encoded:
    """An opened image that is not decoded yet: its reader, its bytes and its frame."""

    reader: type[Any]
    content: bytes
    frame: int
    info: dict[Any, Any]

    def open(self) -> Image.Image:
        """The image, not decoded."""
        image: Image.Image = self.reader(io.BytesIO(self.content))
        if self.frame:
            image.seek(self.frame)
        # Some readers keep hold of the dictionary.
        image.info.clear()
        image.info.update(self.info)
        return image


def encoded(image: Image.Image) -> Encoded | None:
    """An image's encoded bytes; None if it is decoded, was never encoded, or is smaller when decoded."""
    found = _opened_anew(image)
    return None if found is None else found[0]


def _opened_anew(image: Image.Image) -> tuple[Encoded, Image.Image] | None:
    from PIL import ImageFile

    if not isinstance(image, ImageFile.ImageFile):
        return None
    with _SHARED:
        content = _content(image) if _pending(image) else None
    if content is None:
        return None
    made = Encoded(type(image), content, image.tell(), dict(image.info))
    opened = made.open()
    return (made, opened) if _decoding(opened) == _decoding(image) else None


def _pending(image: Any) -> bool:
    """Whether pixels are still to be decoded from a file."""
    held = vars(image)
    return image.fp is not None and bool(image.tile or held.get("_im", held.get("im")) is None)


def _content(image: Any) -> bytes | None:
    file, most = image.fp, MAX_PIXEL_BYTES * image.width * image.height + SPARE_BYTES
    place = file.tell()
    try:
        file.seek(0, io.SEEK_END)
        if file.tell() > most:
            return None
        file.seek(0)
        content: bytes = file.read()
        return content
    finally:
        file.seek(place)


def _decoding(image: Any) -> tuple[Any, ...]:
    """What an image will be decoded to; a draft or another size of an icon differs from its file."""
    return image.size, image.mode, image.tile


def shared_rgb(image: Image.Image) -> Image.Image:
    """As `upright_rgb`, of an image that other samples or threads may hold too; it stays as it is.

    Raises:
        ValueError: As `upright_rgb`.
        OSError: As `upright_rgb`.
    """
    found = _opened_anew(image)
    if found is not None:
        return upright_rgb(found[1])
    with _SHARED:
        turned = _upright(image)
    return _rgb(turned)


def upright_rgb(image: Image.Image) -> Image.Image:
    """A picture in RGB, of an image that nobody else uses.

    The orientation of EXIF is applied. Grey of 16 bits is scaled to 8. Transparency is composed on white. Of
    an animation the first frame is taken.

    Raises:
        ValueError: If the picture has no pixel, has several pages, or a channel has more than 16 bits.
        OSError: If its data cannot be decoded.
    """
    return _rgb(_upright(image))


def _upright(image: Image.Image) -> Image.Image:
    """A copy that is decoded and upright."""
    from PIL import ImageOps

    if 0 in image.size:
        raise ValueError(f"must have pixels, got {image.width} x {image.height}")
    # The frames of an animation are counted by decoding them; a small file can hold half a million.
    if image.format in _PAGED and (pages := getattr(image, "n_frames", 1)) > 1:
        raise ValueError(f"must be one picture, got {pages} pages; save each page as a file")
    if image.mode in _WIDE:
        raise ValueError(f"must have 8 or 16 bits per channel, got {_WIDE[image.mode]}; scale it to 8 bits")
    return ImageOps.exif_transpose(image)


def _rgb(turned: Image.Image) -> Image.Image:
    from PIL import Image

    if turned.mode.startswith(_SIXTEEN_BITS):
        values = np.asarray(turned)
        grey = (values.astype(np.float64) * (255 / 65535)).round().astype(np.uint8)
        grey[values == turned.info.get("transparency", -1)] = 255
        return Image.fromarray(grey).convert("RGB")
    if not turned.has_transparency_data:
        return turned.convert("RGB")
    shown = turned.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown).convert("RGB")
