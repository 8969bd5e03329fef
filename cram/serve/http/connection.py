"""The web server below the application: uvicorn, with bounds on idle connections and on a stop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 30.0
# Looks between which not a byte was taken.
STALLED_LOOKS = 2
# After the drain, seconds for the last words to those whose answers were given up.
LAST_WORDS_S = 3.0
_BUSY = object()


class LivelyConnection(H11Protocol):
    """A connection that ends if its client neither asks nor reads.

    It is closed if no whole head of a request comes within one to two `HEAD_S`, and cut off if nothing of
    what is to be sent is taken for two to three. Uvicorn alone keeps such a connection for ever, so that a
    few hundred of them lock everybody else out. Between two requests its own limit of 5 seconds holds.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begin to look."""
        super().connection_made(transport)
        self._lost = False
        self._look(_BUSY, 0, 0)

    def connection_lost(self, exc: Exception | None) -> None:
        """Look no more."""
        self._lost = True
        super().connection_lost(exc)

    def _look(self, before: object, unsent: int, stalled: int) -> None:
        """End the connection if it has waited for a head, or for its reader, since the last looks."""
        if self._lost:
            return
        left = self.transport.get_write_buffer_size()
        stalled = stalled + 1 if left and left == unsent else 0
        waits = self.cycle is None or self.cycle.response_complete
        if stalled == STALLED_LOOKS:
            self.transport.abort()
        elif waits and before is self.cycle:
            self.transport.close()
        self.loop.call_later(HEAD_S, self._look, self.cycle if waits else _BUSY, left, stalled)


class Draining(uvicorn.Server):
    """A server that gives up the answers in flight, so that each ends in words, before uvicorn cuts them off.

    A second signal gives them up at once, a third one cuts them off.

    Args:
        config: Of uvicorn.
        give_up: Ends what is left.
        drain_s: Seconds that a stop waits for the answers in flight.
    """

    def __init__(self, config: uvicorn.Config, give_up: Callable[[], Any], drain_s: float) -> None:
        super().__init__(config)
        self._give_up, self._drain_s, self._hurries = give_up, drain_s, False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal."""
        if self.should_exit and not self._hurries:
            self._hurries = True
        else:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: Any = None) -> None:
        """Take no more connections and wait for those that are there."""
        drain = asyncio.create_task(self._drain())
        await super().shutdown(sockets)
        drain.cancel()

    async def _drain(self) -> None:
        deadline = time.monotonic() + self._drain_s
        while time.monotonic() < deadline and not self._hurries:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(self._give_up)


def web_server(
    app: Any, give_up: Callable[[], Any], drain_s: float, log_level: str = "warning"
) -> uvicorn.Server:
    """The server of an application.

    Args:
        app: The application (ASGI).
        give_up: Ends the answers that are left when a stop has waited for `drain_s`.
        drain_s: Seconds that a stop waits for the answers in flight.
        log_level: From which level on uvicorn speaks.
    """
    config = uvicorn.Config(
        app,
        http=LivelyConnection,
        log_level=log_level,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=drain_s + LAST_WORDS_S,
    )
    return Draining(config, give_up, drain_s)
