"""A process that dies, or a disk that is full, at one of its writes.

The writes of an undisturbed run are counted first; then each of them can be the last one.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the package catches it or cleans up after it."""


# What changes the disk. A file's content counts at its flush, an open file at its creation.
GROWING = ("mkdir", "open", "fsync", "replace", "rename")
SHRINKING = ("unlink", "rmdir")


@contextmanager
def writes(at: int | None = None, after: bool = False, full: bool = False) -> Iterator[list[str]]:
    """Record every write inside as "function path", in order.

    Args:
        at: Index of the write that is the last one; None for an undisturbed run.
        after: Whether that write still happens.
        full: The disk is full from there on: what grows fails with ENOSPC, and the process lives.
    """
    found: list[str] = []
    dead = False

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal dead
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args, **kwargs)
            if dead and not (full and name in SHRINKING):
                raise _fault(full)
            found.append(f"{name} {_path(args[0])}")
            if len(found) - 1 != at:
                return real(*args, **kwargs)
            dead = True
            if after:
                with suppress(OSError):  # It may have failed anyway, as making a folder that is there.
                    real(*args, **kwargs)
            raise _fault(full)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in (*GROWING, *SHRINKING):
            patch.setattr(os, name, wrap(name, getattr(os, name)))
        yield found


def _fault(full: bool) -> BaseException:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if full else Killed()


def _path(target: Any) -> str:
    return os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(Path(target))


def every_end(work: Callable[[], object], restore: Callable[[], object], step: int = 1) -> Iterator[str]:
    """Let `work` die before and after each of its writes; yields after each death, which it names.

    Args:
        work: What writes; it is run once undisturbed.
        restore: Puts everything back to where `work` begins.
        step: Every so many writes alone, the first and the last among them.
    """
    restore()
    with writes() as counted:
        work()
    points = sorted({*range(0, len(counted), step), len(counted) - 1})
    assert len(points) > 3
    for point in points:
        for after in (False, True):
            restore()
            with writes(point, after) as found, pytest.raises(Killed):
                work()
            yield f"{'after' if after else 'before'} {point}: {found[point]}"
