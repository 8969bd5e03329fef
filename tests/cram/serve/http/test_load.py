"""The server far beyond its capacity: it answers or refuses, keeps its memory, and recovers."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks import load
from tests.cram.serve.http.running import Client, messages
from tests.cram.serve.test_command import free_port, trained, wait_until_healthy

__all__ = ["trained"]
SECONDS = float(os.environ.get("CRAM_LOAD_SECONDS", "60"))
BODY = {"model": "cram", "messages": messages("Which colour", 0), "max_tokens": 24}


@contextmanager
def server(run: Path) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """`cram serve` with four rows and a queue of four; its port and its process."""
    port = free_port()
    sizes = ["--rows", "4", "--queue", "4", "--port", str(port)]
    command = [sys.executable, "-m", "cram", "serve", "--run", str(run), *sizes]
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        try:
            wait_until_healthy(port, process)
            yield port, process
        finally:
            process.kill()


def resident_kib(process: subprocess.Popen[bytes]) -> int:
    """Resident memory of a process."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


@pytest.mark.slow
def test_four_times_the_capacity_is_answered_or_refused(trained: Path) -> None:
    with server(trained / "run") as (port, process):
        began = time.monotonic()
        asyncio.run(load.closed(port, [BODY] * 40, 4))
        rate = 4 * 40 / (time.monotonic() - began)
        asyncio.run(load.opened(port, [BODY], rate, SECONDS / 3, seed=0))
        first = resident_kib(process)
        heard = asyncio.run(load.opened(port, [BODY], rate, 2 * SECONDS / 3, seed=1))
        last = resident_kib(process)
        ended = time.monotonic()
        client = Client(f"http://127.0.0.1:{port}")
        while client.send("/v1/chat/completions", BODY)[0] != 200:
            assert time.monotonic() - ended < 5, "the server must answer 5 s after the load"
        # A row is counted until just after its last token has been sent.
        while client.send("/health")[1] != {"status": "ok", "waiting": 0, "in_flight": 0}:
            assert time.monotonic() - ended < 5, "nothing must be in flight after the last answer"
    assert {each.status for each in heard} == {200, 429}
    assert all(each.whole for each in heard if each.status == 200)
    answered = sum(each.status == 200 for each in heard)
    print(f"{rate:.0f}/s asked, {answered} of {len(heard)} answered, RSS {first} -> {last} KiB")
    # A server that collapses under refusals would answer few.
    assert answered > 0.5 * rate / 4 * 2 * SECONDS / 3
    assert last < 1.02 * first
