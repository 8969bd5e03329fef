"""The application: its routes, and what lives as long as it does."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from cram.serve.bundles import Bundles
from cram.serve.engine.engine import Engine
from cram.serve.engine.worker import FAULTS
from cram.serve.http.admin import Admin
from cram.serve.http.body import Settings
from cram.serve.http.errors import HANDLERS, failure
from cram.serve.http.page import Example, Page
from cram.serve.http.server import Server
from cram.serve.request import QueueFullError

LOG = logging.getLogger("cram.serve")
WATCH_S = 1.0
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9_.-]+))(?::[0-9]+)?")


def create_app(
    engine: Engine,
    processor: Any,
    settings: Settings | None = None,
    bundles: Bundles | None = None,
    examples: Sequence[Example] = (),
) -> Starlette:
    """The application; it starts the engine and stops it.

    Args:
        engine: An engine that has not been started.
        processor: The processor of its model.
        settings: Bounds and rights.
        bundles: Changes the bundle; None for no changes.
        examples: Questions that the page offers.
    """
    settings = settings or Settings()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        engine.start()
        watching = bundles is not None and bundles.watched is not None
        watch = asyncio.create_task(_watch(bundles)) if bundles is not None and watching else None
        yield
        if watch is not None:
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch
        await asyncio.to_thread(engine.stop, 0)

    routes = [*Server(engine, processor, settings).routes(), *Page(examples).routes()]
    if bundles is not None:
        routes += Admin(bundles, settings).routes()
    trusted = [Middleware(KnownHosts, hosts=settings.hosts)] if settings.hosts else []
    return Starlette(routes=routes, exception_handlers=HANDLERS, lifespan=lifespan, middleware=trusted)


class KnownHosts:
    """Refuses requests that call the server by another name, such as one that another site has led to it.

    Args:
        app: The application.
        hosts: The server's names, without ports.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "http" and host_name(Headers(scope=scope).get("host", "")) not in self._hosts:
            text = f"the header Host must name one of {', '.join(self._hosts)}, got another"
            await JSONResponse(failure(text, "invalid_request_error"), 400)(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def host_name(header: str) -> str | None:
    """The name in a header `Host`, without its port; None for what is no name."""
    found = _HOST.fullmatch(header)
    return None if found is None else (found[1] or found[2]).lower()


async def _watch(bundles: Bundles) -> None:
    while True:
        try:
            await asyncio.to_thread(bundles.poll)
        except (*FAULTS, QueueFullError) as error:
            # The next bundle may be well.
            LOG.error("the bundles could not be watched: %r", error)
        await asyncio.sleep(WATCH_S)
