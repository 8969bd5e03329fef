"""Images that come as data URLs; nothing is fetched."""

from __future__ import annotations

import base64
import binascii
from typing import Any

from PIL import Image

from cram.serve.http.fields import IN_IMAGES, refuse_others
from cram.serve.images import decoded
from cram.serve.request import RequestError


def read_image(given: Any, where: str, max_pixels: int) -> Image.Image:
    """The image of an `image_url` part.

    Args:
        given: The value of `image_url`.
        where: Its place in the request, for errors.
        max_pixels: Pixels that it may have.

    Raises:
        RequestError: If it is no data URL in base64, or as `decoded`.
    """
    content = _content(given, where)
    try:
        return decoded(content, max_pixels)
    except ValueError as error:
        raise RequestError(f"{where}: {error}") from None


def _content(given: Any, where: str) -> bytes:
    url = given.get("url") if isinstance(given, dict) else None
    header, _, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    # Letters of either case mean the same in all of it.
    header = header.lower()
    if not header.startswith("data:image/"):
        raise RequestError(f"{where}: image_url.url must be a data URL of an image, got another")
    refuse_others(given, ("url",), IN_IMAGES, f"{where}.content.image_url.")
    if not header.endswith(";base64"):
        raise RequestError(f"{where}: image data must be in base64, got another encoding")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(f"{where}: image data must be valid base64, got other text") from None
