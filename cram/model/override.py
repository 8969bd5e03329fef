"""Routes that a caller puts in place of the automatic one, each for one thread."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from cram.routing.query import Route
from cram.routing.threads import PerThread


def _running() -> weakref.WeakSet[threading.Thread]:
    return weakref.WeakSet([*threading.enumerate(), threading.current_thread()])


@dataclass(frozen=True, eq=False)
class Override:
    """A route that every forward uses in place of the automatic one; None switches the experts off.

    Attributes:
        route: The route.
        before: The threads that ran when it was made.
    """

    route: Route | None
    before: weakref.WeakSet[threading.Thread] = field(default_factory=_running)


class Overrides:
    """The overrides of one model: the newest of each thread."""

    def __init__(self) -> None:
        self._mine: PerThread[Override | None] = PerThread(None)
        self._all: list[Override] = []

    def __getstate__(self) -> dict[str, Any]:
        """Copies are routed automatically."""
        return {}

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    @property
    def mine(self) -> Override | None:
        """The override of this thread, or None."""
        return self._mine.get()

    @contextmanager
    def entered(self, override: Override) -> Iterator[None]:
        """Inside, this thread has an override."""
        before = self.mine
        self._mine.set(override)
        self._all.append(override)
        try:
            yield
        finally:
            self._mine.set(before)
            self._all.remove(override)

    def check(self) -> None:
        """Refuse a thread without an override that was started while another thread had one.

        Such a thread may run what its starter meant to override (a streamer reads what another thread
        generates), and its automatic route would be a silent change.

        Raises:
            ValueError: If this thread is one.
        """
        if self.mine is not None or not self._all:
            return
        current = threading.current_thread()
        if any(current not in override.before for override in list(self._all)):
            raise ValueError(
                "`model.cram.fixed`, `forced` and `disabled` must be entered in the thread that runs the "
                "model, got a thread that was started while another thread had entered one"
            )
