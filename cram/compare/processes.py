"""Several pieces of work at once, each in a process of its own with its share of the threads.

This helps if one piece of work is too small to keep all cores busy. The processes end together with the
process that started them, even if that process is killed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import torch

from cram.console import KNOWN_ERRORS, first_line, quiet_transformers

POLL_S = 0.5


@dataclass(frozen=True)
class Job:
    """A piece of work: `work(*arguments)`, both picklable. It begins after the job named `after` is done."""

    name: str
    work: Callable[..., None]
    arguments: tuple[Any, ...]
    after: str | None = None


def run_side_by_side(jobs: Sequence[Job], at_once: int, watch: Callable[[Set[str]], None]) -> None:
    """Run all jobs. They begin in order, except that a job waits for the job that it comes after.

    Args:
        jobs: Jobs with different names. `after` names an earlier job.
        at_once: Maximum number of processes. Each gets an equal share of the threads, at least one.
        watch: Called about every half second with the names of the finished jobs.

    Raises:
        ValueError: If a job raised one of `cram.console.KNOWN_ERRORS`. The other jobs are stopped.
        ChildProcessError: If a process ended in another way.
    """
    threads = max(1, torch.get_num_threads() // at_once)
    waiting = list(jobs)
    done: set[str] = set()
    running: dict[str, tuple[SpawnProcess, Connection]] = {}
    try:
        while waiting or running:
            free = at_once - len(running)
            for job in [job for job in waiting if job.after is None or job.after in done][:free]:
                running[job.name] = _start(job, threads)
                waiting.remove(job)
            wait([process.sentinel for process, _ in running.values()], POLL_S)
            for name, (process, said) in list(running.items()):
                if process.exitcode is not None:
                    _check(name, process.exitcode, said)
                    del running[name]
                    done.add(name)
            watch(done)
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.join()


def _start(job: Job, threads: int) -> tuple[SpawnProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(job, threads, theirs), name=job.name, daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _check(name: str, code: int, said: Connection) -> None:
    with said:
        try:
            fault = said.recv()
        except EOFError:
            fault = ""
    if fault:
        raise ValueError(f"{name}: {fault}")
    if code:
        raise ChildProcessError(f"process of {name} must end with code 0, got {code}")


def _child(job: Job, threads: int, faults: Connection) -> None:
    # An interrupt also reaches the parent process, and the parent ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    quiet_transformers()
    try:
        job.work(*job.arguments)
    except KNOWN_ERRORS as error:
        faults.send(first_line(error))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
