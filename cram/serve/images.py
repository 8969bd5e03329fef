"""Pictures that clients send as bytes, read with suspicion."""

from __future__ import annotations

import io

from PIL import Image

from cram.streams.types import open_image

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 4096 * 4096
# A processor that resizes by the shorter side to 336 makes 336 x 20 million pixels of a strip of 1 x 60,000.
MAX_RATIO = 200
_NOT_IMAGES = (OSError, ValueError, SyntaxError, EOFError)
# Pillow has a limit of its own.
_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def decoded(content: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An image from its bytes; see `cram.streams.types.open_image`.

    Args:
        content: The bytes.
        max_pixels: Pixels that it may have; the header is read before the pixels.

    Raises:
        ValueError: If it is no whole picture, has more pixels, or is longer than `MAX_RATIO` times its width.
    """
    try:
        with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
            fault = _fault(image.width, image.height, max_pixels)
            if not fault:
                return open_image(image)
    except _TOO_LARGE:
        fault = f"have at most {max_pixels} pixels, got more"
    except _NOT_IMAGES:
        fault = f"be a whole picture of {IMAGE_FORMATS}, got other bytes"
    raise ValueError(f"an image must {fault}")


def _fault(width: int, height: int, max_pixels: int) -> str:
    if width * height > max_pixels:
        return f"have at most {max_pixels} pixels, got {width * height}"
    if max(width, height) > MAX_RATIO * min(width, height):
        return f"be at most {MAX_RATIO} times as long as wide, got {width} x {height}"
    return ""
