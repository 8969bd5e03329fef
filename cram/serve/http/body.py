"""The JSON body of a request, within bounds of size and time."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request

from cram.serve.images import MAX_PIXELS
from cram.serve.request import RequestError

# Nobody reads the rest of the body, so nothing can follow it on the same connection.
CLOSE = {"Connection": "close"}


@dataclass(frozen=True)
class Settings:
    """Bounds and rights of the HTTP server.

    Attributes:
        max_body: Bytes of a request at most.
        max_pixels: Pixels of all images of a request together at most.
        max_held: Bytes of images and model inputs of all requests together at most.
        body_s: Seconds within which a request must have been sent.
        admin_token: What opens the admin routes; None closes them.
        hosts: Names by which clients may call the server; empty for any.
    """

    max_body: int = 16 << 20
    max_pixels: int = MAX_PIXELS
    max_held: int = 2 << 30
    body_s: float = 30.0
    admin_token: str | None = None
    hosts: tuple[str, ...] = ()


async def read_json(http: Request, settings: Settings) -> Any:
    """The body of a request.

    Raises:
        HTTPException: 415 for another content type or an encoding, 413 for a body that is too large, 408 for
            a slow one.
        RequestError: If the body is not JSON, or an object in it has a name twice.
    """
    # A page of another site can send no JSON without asking first, and is never allowed to.
    if http.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "the content type must be application/json, got another", CLOSE)
    if http.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise HTTPException(415, "the body must have no content encoding, got one", CLOSE)
    content, too_large = bytearray(), f"the body must have at most {settings.max_body} bytes, got more"
    announced = http.headers.get("content-length", "")
    # A longer row of digits is no size of anything.
    if announced.isdecimal() and (len(announced) > 18 or int(announced) > settings.max_body):
        raise HTTPException(413, too_large, CLOSE)
    try:
        async with asyncio.timeout(settings.body_s):
            async for chunk in http.stream():
                content += chunk
                if len(content) > settings.max_body:
                    raise HTTPException(413, too_large, CLOSE)
    except TimeoutError:
        wanted = f"the body must arrive within {settings.body_s:g} s, got a part"
        raise HTTPException(408, wanted, CLOSE) from None
    try:
        return json.loads(content, parse_constant=_refuse_constant, object_pairs_hook=_distinct)
    except RequestError:
        raise
    except (ValueError, RecursionError):
        raise RequestError("the body must be JSON, got other text") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of a name that is there twice nobody knows which value is meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise RequestError(f"the body must have each name once in an object, got {twice!r:.100} twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"numbers must be finite, got {name}")
