"""The web server below the application: uvicorn, with a bound on the time of a request's head."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 30.0
_BUSY = object()


class HeadsInTime(H11Protocol):
    """A connection that is closed if no whole head of a request comes within one to two `HEAD_S`.

    Uvicorn alone keeps a silent connection for ever, so that a few hundred of them lock everybody else out.
    Between two requests its own limit of 5 seconds holds.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begin to look."""
        super().connection_made(transport)
        self._look(_BUSY)

    def _look(self, before: object) -> None:
        """Close the connection if it has waited for a head since the last look."""
        if self.transport.is_closing():
            return
        waits = self.cycle is None or self.cycle.response_complete
        if waits and before is self.cycle:
            self.transport.close()
        else:
            self.loop.call_later(HEAD_S, self._look, self.cycle if waits else _BUSY)


def web_server(app: Any, drain_s: float, log_level: str = "warning") -> uvicorn.Server:
    """The server of an application.

    Args:
        app: The application (ASGI).
        drain_s: Seconds that a stop waits for the answers in flight.
        log_level: From which level on uvicorn speaks.
    """
    config = uvicorn.Config(
        app,
        http=HeadsInTime,
        log_level=log_level,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(drain_s)),
    )
    return uvicorn.Server(config)
