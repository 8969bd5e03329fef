"""A value that every thread has for itself, and that copies and pickles leave out."""

from __future__ import annotations

import threading
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class PerThread(Generic[T]):
    """One value per thread; `first` where a thread has set none."""

    def __init__(self, first: T) -> None:
        self._first = first
        self._local = threading.local()

    def get(self) -> T:
        """This thread's value."""
        value: T = getattr(self._local, "value", self._first)
        return value

    def set(self, value: T) -> None:
        """Set this thread's value."""
        self._local.value = value

    def __getstate__(self) -> dict[str, Any]:
        """Copies begin without values, which belong to live graphs and running calls."""
        return {"first": self._first}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["first"])  # type: ignore[misc]
