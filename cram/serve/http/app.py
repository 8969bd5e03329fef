"""The application: its routes, and what lives as long as it does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from cram.serve.bundles import Bundles
from cram.serve.engine.engine import Engine
from cram.serve.http.admin import Admin
from cram.serve.http.body import Settings
from cram.serve.http.errors import HANDLERS
from cram.serve.http.page import Example, Page
from cram.serve.http.server import Server

WATCH_S = 1.0


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
        await asyncio.to_thread(engine.stop, settings.drain_s)

    routes = [*Server(engine, processor, settings).routes(), *Page(examples).routes()]
    if bundles is not None:
        routes += Admin(bundles, settings).routes()
    trusted = (
        [Middleware(TrustedHostMiddleware, allowed_hosts=list(settings.hosts))] if settings.hosts else []
    )
    return Starlette(routes=routes, exception_handlers=HANDLERS, lifespan=lifespan, middleware=trusted)


async def _watch(bundles: Bundles) -> None:
    while True:
        await asyncio.to_thread(bundles.poll)
        await asyncio.sleep(WATCH_S)
