"""What the terminal shows: one line of progress, and one line per error that a user can mend.

The progress line is redrawn on a terminal. Elsewhere it is written at every tenth.
"""

from __future__ import annotations

import sys
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import TracebackType

from safetensors import SafetensorError

WIDTH = 24
MIN_REDRAW_S = 0.1

# Faults that a user can mend: a wrong path, an unknown name, damaged data, a missing package.
KNOWN_ERRORS = (ValueError, OSError, NotImplementedError, ModuleNotFoundError, SafetensorError)

OWN_DISTRIBUTION, NAMESAKE = "cram-mcit", "cram"


class ProgressBar:
    """Progress over a known number of steps, used as a context manager.

    Args:
        label: What is being done.
        total: Steps.
        shown: False writes nothing.
    """

    def __init__(self, label: str, total: int, shown: bool = True) -> None:
        self.label, self.total, self.shown = label, total, shown
        self.done = 0
        self._started = time.monotonic()
        self._drawn = 0.0
        self._tty = sys.stderr.isatty()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.shown and self._tty and self.done:
            sys.stderr.write("\n")

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count steps and show `note` beside them."""
        before, self.done = self.done, self.done + steps
        if not self.shown:
            return
        now = time.monotonic()
        if self._tty and (now - self._drawn >= MIN_REDRAW_S or self.done >= self.total):
            self._drawn = now
            sys.stderr.write(f"\r\033[K{self.line(note)}")
            sys.stderr.flush()
        elif not self._tty and before * 10 // self.total != self.done * 10 // self.total:
            sys.stderr.write(f"{self.line(note)}\n")
            sys.stderr.flush()

    def line(self, note: str = "") -> str:
        """The line as it is shown at this moment."""
        elapsed = time.monotonic() - self._started
        left = elapsed / max(1, self.done) * (self.total - self.done)
        filled = WIDTH * self.done // max(1, self.total)
        bar = "#" * filled + "-" * (WIDTH - filled)
        times = f"{clock(elapsed)}, {clock(left)} left"
        return f"{self.label} [{bar}] {self.done}/{self.total} {times}  {note}".rstrip()


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def quiet_transformers() -> None:
    """Leave the terminal to this package's own progress, if transformers is there at all."""
    if find_spec("transformers") is not None:
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or the error's type where the text is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def namesake() -> str | None:
    """One line that says what to do if another distribution has the same import name, else None."""
    try:
        other = version(NAMESAKE)
    except PackageNotFoundError:
        return None
    return (
        f"another distribution, {NAMESAKE} {other}, installs the same import and the same command; "
        f"pip uninstall {NAMESAKE}, then install {OWN_DISTRIBUTION} again"
    )
