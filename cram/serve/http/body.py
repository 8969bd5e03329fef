"""The JSON bodies of requests, within bounds of size and time."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request

from cram.serve.images import MAX_PIXELS
from cram.serve.request import QueueFullError, RequestError

# Nobody reads the rest of the body, so nothing can follow it on the same connection.
CLOSE = {"Connection": "close"}
# A body of this size is never refused for the sake of others.
SMALL_BODY = 65536


@dataclass(frozen=True)
class Settings:
    """Bounds and rights of the HTTP server.

    Attributes:
        max_body: Bytes of a request at most.
        max_bodies: Bytes of all requests together that are being sent or parsed.
        max_pixels: Pixels of all images of a request together at most.
        max_held: Bytes of images and model inputs of all requests together at most.
        body_s: Seconds within which a request must have been sent.
        admin_token: What opens the admin routes; None closes them.
        hosts: Names by which clients may call the server; empty for any.
    """

    max_body: int = 16 << 20
    max_bodies: int = 64 << 20
    max_pixels: int = MAX_PIXELS
    max_held: int = 2 << 30
    body_s: float = 30.0
    admin_token: str | None = None
    hosts: tuple[str, ...] = ()


class Bodies:
    """Reads the bodies of requests.

    Args:
        settings: Their bounds.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings, self._held = settings, 0

    @asynccontextmanager
    async def read(self, http: Request) -> AsyncIterator[Any]:
        """The body of a request; its bytes are counted until the context ends.

        Raises:
            HTTPException: 415 for another content type or an encoding, 413 for a body that is too large, 408
                for a slow one, 503 where the server stops before it is whole.
            QueueFullError: If the bodies of all requests are too large together.
            RequestError: If the body is not JSON, or an object in it has a name twice.
        """
        # A page of another site can send no JSON without asking first, and is never allowed to.
        if http.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "the content type must be application/json, got another", CLOSE)
        if http.headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise HTTPException(415, "the body must have no content encoding, got one", CLOSE)
        content = bytearray()
        try:
            await self._receive(http, content)
            yield _parsed(content)
        finally:
            self._held -= len(content)

    async def _receive(self, http: Request, content: bytearray) -> None:
        most, seconds = self._settings.max_body, self._settings.body_s
        too_large = HTTPException(413, f"the body must have at most {most} bytes, got more", CLOSE)
        announced = http.headers.get("content-length", "")
        # A longer row of digits is no size of anything.
        if announced.isdecimal() and (len(announced) > 18 or int(announced) > most):
            raise too_large
        try:
            async with asyncio.timeout(seconds):
                async for chunk in http.stream():
                    content += chunk
                    self._held += len(chunk)
                    if len(content) > most:
                        raise too_large
                    if len(content) > SMALL_BODY and self._held > self._settings.max_bodies:
                        raise QueueFullError("the requests that are being sent are too large together")
        except TimeoutError:
            wanted = f"the body must arrive within {seconds:g} s, got a part"
            raise HTTPException(408, wanted, CLOSE) from None
        except asyncio.CancelledError:  # Only a stop of the server cancels what reads a body.
            raise HTTPException(503, "the server has stopped", CLOSE) from None


def _parsed(content: bytearray) -> Any:
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
