"""What a client is told when a request fails: OpenAI's error objects, and never a path or a traceback."""

from __future__ import annotations

from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from cram.serve.request import Failed, QueueFullError, RequestError

RETRY_S = "1"


def failure(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """An error object."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def failed(event: Failed) -> Response:
    """The reply to a request that the engine could not answer."""
    fault = event.fault == "request"
    kind = "invalid_request_error" if fault else "server_error"
    return JSONResponse(failure(event.message, kind), 400 if fault else 500)


async def _refused(http: Request, error: Exception) -> Response:
    return JSONResponse(failure(str(error), "invalid_request_error"), 400)


async def _busy(http: Request, error: Exception) -> Response:
    return JSONResponse(failure(str(error), "rate_limit_error"), 429, {"Retry-After": RETRY_S})


async def _http_error(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    reply = failure(error.detail, "invalid_request_error")
    return JSONResponse(reply, error.status_code, error.headers)


async def _gone(http: Request, error: Exception) -> Response:
    """Nobody reads this reply; its status marks the log line of a client that left."""
    return Response(status_code=499)


async def _server_error(http: Request, error: Exception) -> Response:
    return JSONResponse(failure("the server failed", "server_error"), 500)


HANDLERS: Any = {
    RequestError: _refused,
    QueueFullError: _busy,
    HTTPException: _http_error,
    ClientDisconnect: _gone,
    Exception: _server_error,
}
