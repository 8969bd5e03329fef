"""Images that come as data URLs; nothing is fetched."""

from __future__ import annotations

import base64
import binascii
import io
from typing import Any

from PIL import Image

from cram.serve.request import RequestError
from cram.streams.types import open_image

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
NOT_IMAGES = (OSError, ValueError, SyntaxError, EOFError)
# Pillow has a limit of its own.
TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def read_image(given: Any, where: str, max_pixels: int) -> Image.Image:
    """The image of an `image_url` part.

    Args:
        given: The value of `image_url`.
        where: Its place in the request, for errors.
        max_pixels: Pixels that it may have; the header is read before the pixels.

    Raises:
        RequestError: If it is no data URL of a whole image, or has more pixels.
    """
    content = _content(given, where)
    try:
        with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
            pixels = image.width * image.height
            if pixels > max_pixels:
                raise RequestError(f"{where}: an image must have at most {max_pixels} pixels, got {pixels}")
            return open_image(image)
    except RequestError:
        raise
    except TOO_LARGE:
        raise RequestError(f"{where}: an image must have at most {max_pixels} pixels, got more") from None
    except NOT_IMAGES:
        raise RequestError(
            f"{where}: image data must be a whole image of {IMAGE_FORMATS}, got other bytes"
        ) from None


def _content(given: Any, where: str) -> bytes:
    url = given.get("url") if isinstance(given, dict) else None
    if not isinstance(url, str) or not url.startswith("data:image/"):
        raise RequestError(f"{where}: image_url.url must be a data URL of an image, got another")
    header, _, data = url.partition(",")
    if not header.endswith(";base64"):
        raise RequestError(f"{where}: image data must be in base64, got another encoding")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(f"{where}: image data must be valid base64, got other text") from None
