"""A request's events on their way from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio

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

    async def next_unless(self, http: Request) -> Event:
        """The next event.

        Raises:
            ClientDisconnect: If the client goes first.
        """
        fetched = asyncio.ensure_future(self._events.get())
        gone = asyncio.ensure_future(http.receive())
        try:
            await asyncio.wait({fetched, gone}, return_when=asyncio.FIRST_COMPLETED)
            if fetched.done():
                return fetched.result()
            raise ClientDisconnect
        finally:
            fetched.cancel()
            gone.cancel()
