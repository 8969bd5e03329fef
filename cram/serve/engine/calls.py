"""Functions that the engine's thread runs for other threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from cram.serve.engine.worker import FAULTS
from cram.serve.request import QueueFullError


class Call:
    """A function that the engine's thread runs, and the future of its result."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function
        self.future: Future[Any] = Future()

    def run(self) -> None:
        """Run the function, unless nobody waits for it any more."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.function())
        except FAULTS as error:
            self.future.set_exception(error)
        finally:
            if not self.future.done():
                self.future.set_exception(RuntimeError("the call has failed"))

    def refuse(self) -> None:
        """The function will never run."""
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(QueueFullError("the server has stopped"))
