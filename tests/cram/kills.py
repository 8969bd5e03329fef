"""A process that dies at one of its writes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the package catches it or cleans up after it."""


WRITES = ("replace", "rename", "fsync")


def kill_at(monkeypatch: pytest.MonkeyPatch, point: int) -> None:
    """From here on the `point`-th rename or flush raises instead of happening."""
    count = 0

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == point:
                raise Killed
            return real(*args, **kwargs)

        return call

    for name in WRITES:
        monkeypatch.setattr(os, name, wrap(getattr(os, name)))
