"""The routes that change the experts; they want the admin token, and without one they do not exist."""

from __future__ import annotations

import asyncio
import hmac

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cram.serve.bundles import Bundles
from cram.serve.engine.versions import Version
from cram.serve.http.body import Bodies, Settings


class Admin:
    """The routes.

    Args:
        bundles: Changes the bundle.
        settings: Bounds and rights.
    """

    def __init__(self, bundles: Bundles, settings: Settings) -> None:
        self._bundles, self._settings, self._bodies = bundles, settings, Bodies(settings)

    def routes(self) -> list[Route]:
        """The routes."""
        return [
            Route("/v1/cram/bundle", self.bundle, methods=["POST"]),
            Route("/v1/cram/rollback", self.rollback, methods=["POST"]),
        ]

    async def bundle(self, http: Request) -> Response:
        """Makes a bundle of the bundle folder current; the body is {"name": folder}."""
        self._admit(http)
        async with self._bodies.read(http) as body:
            name = body.get("name") if isinstance(body, dict) and body.keys() == {"name"} else None
        return _current(await asyncio.to_thread(self._bundles.use, name))

    async def rollback(self, http: Request) -> Response:
        """Makes the experts before the current ones current again."""
        self._admit(http)
        return _current(await asyncio.to_thread(self._bundles.roll_back))

    def _admit(self, http: Request) -> None:
        """Refuse whoever has not the admin token."""
        token = self._settings.admin_token
        if token is None:
            raise HTTPException(404)
        given = http.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise HTTPException(401)


def _current(version: Version) -> Response:
    reply = {"object": "cram.bundle", "version": version.number, "experts": list(version.names)}
    return JSONResponse(reply)
