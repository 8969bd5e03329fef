"""A request's events on their way from the engine's thread to the event loop, and who waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

from starlette.requests import ClientDisconnect, Request

from cram.serve.request import Collector, Event


class Mailbox:
    """Carries events, and puts the answers together.

    Attributes:
        heard: Puts the answers together.
    """

    def __init__(self, heard: Collector) -> None:
        self.heard = heard
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def __call__(self, event: Event) -> None:
        """Take an event, in the engine's thread; after the loop's end nobody listens any more."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._put, event)

    @property
    def waiting(self) -> bool:
        """Whether an event has not been fetched."""
        return not self._events.empty()

    def _put(self, event: Event) -> None:
        self.heard(event)
        self._events.put_nowait(event)

    async def next(self) -> Event:
        """The next event."""
        return await self._events.get()


class Presence:
    """Whether the client of a request whose body has been read is still there; used as a context.

    Args:
        http: The request.
    """

    def __init__(self, http: Request) -> None:
        self._http = http

    async def __aenter__(self) -> Presence:
        """Begin to listen."""
        self._gone = asyncio.ensure_future(self._departure())
        return self

    async def __aexit__(self, *error: object) -> None:
        """Listen no more."""
        self._gone.cancel()

    async def _departure(self) -> None:
        while (await self._http.receive())["type"] != "http.disconnect":
            pass

    async def unless_gone(self, wanted: Awaitable[Any]) -> Any:
        """The result of `wanted`, which is cancelled if the client goes before or together with it.

        Raises:
            ClientDisconnect: If the client has gone.
        """
        found = asyncio.ensure_future(wanted)
        # Where nobody asks for its result, nobody is told of its failure either.
        found.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            await asyncio.wait({found, self._gone}, return_when=asyncio.FIRST_COMPLETED)
            if self._gone.done():
                raise ClientDisconnect
            return found.result()
        finally:
            found.cancel()
