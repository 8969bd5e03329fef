"""Which lines of the sources each test runs, so that a mutant meets only tests that can notice it."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Seen:
    """What ran of the sources: lines, and functions by qualified name, of each source."""

    lines: dict[str, set[int]] = field(default_factory=dict)
    functions: dict[str, set[str]] = field(default_factory=dict)


class Recorder:
    """Records what runs of some sources."""

    def __init__(self, sources: Iterable[str]) -> None:
        self.names = {str(ROOT / source): source for source in sources}
        self.seen = Seen()

    @contextmanager
    def recording(self) -> Iterator[Seen]:
        """Record what runs within the block, in every thread that starts there."""
        seen = self.seen = Seen()
        sys.settrace(self._called)
        threading.settrace(self._called)
        try:
            yield seen
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]

    def _called(self, frame: FrameType, event: str, argument: object) -> Any:
        source = self.names.get(frame.f_code.co_filename)
        if source is None:
            return None
        self.seen.functions.setdefault(source, set()).add(frame.f_code.co_qualname)
        lines = self.seen.lines.setdefault(source, set())

        def ran(frame: FrameType, event: str, argument: object) -> Any:
            if event == "line":
                lines.add(frame.f_lineno)
            return ran

        return ran


@dataclass(frozen=True)
class Test:
    """A test's name within pytest, its processor time in seconds, and the lines it runs of each source."""

    name: str
    seconds: float
    lines: dict[str, list[int]]

    def runs(self, source: str, span: tuple[int, int]) -> bool:
        """Whether the test runs one of the lines from the first to the last of `span`."""
        return any(span[0] <= line <= span[1] for line in self.lines.get(source, ()))


def file_digest(path: str) -> str:
    """Of the text of one file below the repository."""
    return hashlib.sha256((ROOT / path).read_bytes()).hexdigest()[:16]


def keep(folder: Path, file: str, digests: Mapping[str, str], tests: Iterable[Test]) -> None:
    """Write what the tests of a file run, with the digests of the file and of the sources."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [[test.name, test.seconds, test.lines] for test in tests]
    _path(folder, file).write_text(json.dumps({"digests": dict(digests), "tests": rows}), encoding="utf-8")


def kept(folder: Path, file: str, digests: Mapping[str, str]) -> list[Test] | None:
    """What the tests of a file run, or None if it was measured with other digests of a file."""
    path = _path(folder, file)
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    if any(found["digests"].get(path) != digest for path, digest in digests.items()):
        return None
    return [Test(*row) for row in found["tests"]]


def _path(folder: Path, file: str) -> Path:
    return folder / f"{file.replace('/', '.')}.json"
