"""One damaged input under a limit of time and memory, and what a refusal of it must look like."""

from __future__ import annotations

import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

# Processor time, which a busy machine does not stretch; the report has the wall clock beside it. What waits
# longer than the second limit hangs.
SECONDS, HANGING_SECONDS = 5, 300
EXTRA_BYTES = 300 << 20
MOST_CHARACTERS = 2000


class TooSlow(BaseException):
    """The time is over. Nothing in the package catches this."""


@dataclass
class Outcome:
    """What a call gave: its value, or what it raised."""

    value: Any = None
    error: BaseException | None = None

    def __enter__(self) -> Outcome:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.error = error
        return not isinstance(error, KeyboardInterrupt)


@contextmanager
def limits(seconds: float = SECONDS, extra_bytes: int = EXTRA_BYTES) -> Iterator[None]:
    """Stop what takes longer inside, and refuse memory beyond so many bytes more than before."""

    def stop(number: int, frame: object) -> None:
        raise TooSlow(f"longer than {seconds} s" if number == signal.SIGPROF else "hangs")

    before = resource.getrlimit(resource.RLIMIT_AS)
    usual = {number: signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)}
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + extra_bytes, before[1]))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, HANGING_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        for number, handler in usual.items():
            signal.signal(number, handler)


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def attempt(work: Callable[[], Any]) -> Outcome:
    """Call `work` within the limits."""
    with Outcome() as found, limits():
        found.value = work()
    return found


def fault_of_refusal(error: BaseException, place: Path) -> str | None:
    """What is wrong with a refusal, or None: it must be one short line that names a file below `place`."""
    if not isinstance(error, (ValueError, OSError)) or isinstance(error, UnicodeError):
        return f"{type(error).__name__}: {str(error)[:300]}"
    text = str(error)
    if len(text.splitlines()) != 1 or len(text) > MOST_CHARACTERS:
        return f"{len(text.splitlines())} lines, {len(text)} characters: {text[:300]!r}"
    return None if str(place) in text else f"names no file: {text[:300]}"


@dataclass
class Tally:
    """Counts of a fuzzing run, and its findings.

    Attributes:
        counts: Kind of outcome -> how often it came.
        findings: What must be mended.
        slowest: Of the mutation that took longest: seconds by the wall clock and of the processor, its seed.
    """

    counts: dict[str, int] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    slowest: tuple[float, float, int] = (0.0, 0.0, 0)

    @contextmanager
    def timed(self, seed: int) -> Iterator[None]:
        """Measure what is done with a mutation."""
        wall, processor = time.monotonic(), time.process_time()
        yield
        taken = (time.monotonic() - wall, time.process_time() - processor, seed)
        self.slowest = max(self.slowest, taken)

    def add(self, kind: str, seed: int, said: str, finding: str | None) -> None:
        """Count an outcome; a finding is kept with what makes it again."""
        key = "finding" if finding else kind
        self.counts[key] = self.counts.get(key, 0) + 1
        if finding:
            self.findings.append(f"seed {seed}: {said}: {finding}")

    def check(self) -> None:
        """Fail with all findings, and print the counts."""
        wall, processor, seed = self.slowest
        print(f"\n{sum(self.counts.values())} mutations: {self.counts}")
        print(f"slowest: seed {seed}, {wall:.2f} s by the wall clock, {processor:.2f} s of processor time")
        assert not self.findings, f"{len(self.findings)} findings\n" + "\n".join(self.findings[:40])
