"""A client that puts load on a server of chat completions, and what it saw.

`closed` keeps a number of clients busy, each with one request at a time. `opened` sends requests at the
moments of a Poisson process, whatever the server does. Latencies count from those moments, so that a server
that falls behind cannot hide it.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Heard:
    """What a client has heard of one request; moments are in seconds of the monotonic clock.

    Attributes:
        due: When the request was to be sent.
        status: Of the reply; 0 where the connection broke.
        moments: When each token came.
        whole: Whether the stream came to its end.
        ended: When the reply had ended.
    """

    due: float
    status: int = 0
    moments: list[float] = field(default_factory=list)
    whole: bool = False
    ended: float = 0.0

    @property
    def first_s(self) -> float:
        """Seconds to the first token."""
        return self.moments[0] - self.due

    def gaps_s(self) -> list[float]:
        """Seconds from each token to the next."""
        return [later - earlier for earlier, later in zip(self.moments, self.moments[1:], strict=False)]


async def ask(port: int, body: dict[str, Any], due: float | None = None) -> Heard:
    """Send one request as a stream and read it to its end."""
    heard = Heard(time.monotonic() if due is None else due)
    content = json.dumps({**body, "stream": True}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
        writer.write(head.encode() + content)
        heard.status = int((await reader.readline()).split()[1])
        while line := await reader.readline():
            # The first chunk tells the role and the last one that there are no more.
            if line.startswith(b"data: {") and b'"role"' not in line and b'"choices": []' not in line:
                heard.moments.append(time.monotonic())
            heard.whole |= line.startswith(b"data: [DONE]")
        writer.close()
    except (OSError, IndexError, ValueError):
        heard.status = 0
    heard.ended = time.monotonic()
    return heard


async def closed(port: int, bodies: Sequence[dict[str, Any]], clients: int) -> list[Heard]:
    """All requests, sent by so many clients, each when its last one has ended."""
    left = iter(bodies)

    async def client() -> list[Heard]:
        return [await ask(port, body) for body in left]

    found = await asyncio.gather(*(client() for _ in range(clients)))
    return [heard for each in found for heard in each]


def arrivals(rate: float, seconds: float, seed: int) -> Iterator[float]:
    """Moments in [0, seconds) of a Poisson process of `rate` events per second."""
    generator, moment = random.Random(seed), 0.0
    while (moment := moment + generator.expovariate(rate)) < seconds:
        yield moment


async def opened(
    port: int, bodies: Sequence[dict[str, Any]], rate: float, seconds: float, seed: int
) -> list[Heard]:
    """Requests of a Poisson process; `bodies` are taken in turn."""
    began = time.monotonic()

    async def later(moment: float, body: dict[str, Any]) -> Heard:
        await asyncio.sleep(began + moment - time.monotonic())
        return await ask(port, body, began + moment)

    moments = list(arrivals(rate, seconds, seed))
    return await asyncio.gather(*(later(m, bodies[i % len(bodies)]) for i, m in enumerate(moments)))


def percentiles_ms(values_s: Sequence[float]) -> dict[str, float]:
    """Median, 90th and 99th percentile in ms; empty without values."""
    if not values_s:
        return {}
    found = np.percentile(np.array(values_s) * 1e3, (50, 90, 99)).tolist()
    return dict(zip(("p50", "p90", "p99"), found, strict=True))


def summary(heard: Sequence[Heard]) -> dict[str, Any]:
    """Latencies, tokens per second and outcomes of some requests."""
    answered = [each for each in heard if each.status == 200 and each.whole]
    tokens = sum(len(each.moments) for each in answered)
    begun = min((each.due for each in heard), default=0.0)
    seconds = max((each.ended for each in heard), default=0.0) - begun
    return {
        "requests": len(heard),
        "answered": len(answered),
        "refused": sum(each.status == 429 for each in heard),
        "tokens_per_s": tokens / seconds if seconds else 0.0,
        "first_token_ms": percentiles_ms([each.first_s for each in answered]),
        "token_ms": percentiles_ms([gap for each in answered for gap in each.gaps_s()]),
    }
