"""Which bundle a server serves: one that is named, the newest of a watched folder, the last good one.

After every change the name of the served bundle is written to `served.json` beside the bundles, so that a
server that was killed comes back with it.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

from cram.atomic import read_json, write_json
from cram.bundle.bundle import load
from cram.bundle.format import MANIFEST
from cram.bundle.runs import newest_bundle
from cram.serve.engine.engine import Engine
from cram.serve.engine.versions import Version
from cram.serve.engine.worker import FAULTS
from cram.serve.request import RequestError

LOG = logging.getLogger("cram.serve")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
SERVED = "served.json"


class Stamp(NamedTuple):
    """What a bundle looks like from outside.

    Attributes:
        folder: The bundle.
        written: Time of its manifest in ns; another time is another bundle.
        size: Bytes of its files together; they grow while a bundle is copied.
    """

    folder: Path
    written: int
    size: int


def bundles_at_start(root: Path, given: Path | None, found: Collection[Stamp] | None = None) -> list[Path]:
    """The bundles to try at start, the best first.

    Args:
        root: The bundle folder. The bundle of it that was served last comes first.
        given: The bundle to take otherwise; None for the other bundles of the folder, the newest first.
        found: The bundles of the folder; looked for by default.
    """
    found = stamps(root) if found is None else found
    last = []
    if (root / SERVED).is_file():
        try:
            last = [folder_of(root, read_json(root / SERVED, 10_000).get("name"))]
        except (ValueError, OSError, AttributeError) as error:
            LOG.warning("%s is not used: %s", SERVED, error)
    others = [each.folder for each in sorted(found, key=lambda each: -each.written)]
    return [*last, *([given] if given is not None else [each for each in others if each not in last])]


def stamps(root: Path) -> list[Stamp]:
    """The bundles of a folder."""
    folders = list(root.iterdir()) if root.is_dir() else []
    named = [folder for folder in folders if NAME.fullmatch(folder.name) and not folder.is_symlink()]
    return [stamp for folder in named if (stamp := stamp_of(folder)) is not None]


def newest_of_run(run: Path) -> list[Stamp]:
    """The newest bundle of a run; empty before the first task."""
    try:
        stamp = stamp_of(newest_bundle(run)[0])
    except (ValueError, OSError):
        return []
    return [] if stamp is None else [stamp]


def stamp_of(folder: Path) -> Stamp | None:
    """The stamp of a bundle; None for a folder that is none, or that changes at this moment."""
    try:
        written = (folder / MANIFEST).stat().st_mtime_ns
        return Stamp(folder, written, sum(file.stat().st_size for file in folder.rglob("*")))
    except OSError:
        return None


def folder_of(root: Path, name: Any) -> Path:
    """The bundle of a name.

    Raises:
        RequestError: If there is none.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise RequestError('the body must be {"name": the name of a bundle}, got another')
    folder = root / name
    if folder.is_symlink() or not folder.is_dir():
        raise RequestError(f"name must be that of a folder among the bundles, got {name!r}")
    return folder


class Watch:
    """Finds the bundles that have come since a server chose what to serve.

    Args:
        look: Lists the bundles.

    Attributes:
        first: The bundles that were there when the watch began, which is before one of them is chosen.
    """

    def __init__(self, look: Callable[[], list[Stamp]]) -> None:
        self._look, self.first = look, look()
        # Size of a bundle when it was refused; None where it need not be tried again.
        self._seen: dict[Any, int | None] = {}
        self.pass_over(self.first)

    def new(self) -> list[Stamp]:
        """The bundles that are to be tried, the newest first."""
        new = [each for each in self._look() if self._seen.get(each[:2], -1) not in (None, each.size)]
        return sorted(new, key=lambda each: -each.written)

    def pass_over(self, stamps: Iterable[Stamp]) -> None:
        """Try these bundles no more."""
        self._seen.update((each[:2], None) for each in stamps)

    def refuse(self, stamps: Iterable[Stamp]) -> None:
        """Try these bundles again when their files have changed."""
        self._seen.update((each[:2], each.size) for each in stamps)


class Bundles:
    """Changes the bundle of a running engine; may be called from several threads.

    Args:
        engine: The engine.
        model: Its model.
        root: The folder whose bundles may be loaded by name; None for no such changes.
        watched: Finds the new bundles that are loaded by themselves; None for none.
        first: The bundle that the engine begins with.
    """

    def __init__(
        self,
        engine: Engine,
        model: Any,
        root: Path | None = None,
        watched: Watch | None = None,
        first: Path | None = None,
    ) -> None:
        self._engine, self._model, self._root, self.watched = engine, model, root, watched
        self._folders: dict[int, Path | None] = {engine.versions.current.number: first}
        # Held from a change until it is on record, so that the record is that of the last change.
        self._changing = threading.Lock()
        self._record(engine.versions.current)

    def use(self, name: Any) -> Version:
        """Make the bundle of a name current; waits for the engine.

        Raises:
            RequestError: If there is no such bundle, or it is refused; the experts are as they were.
        """
        if self._root is None:
            raise RequestError("the server must be started with a bundle folder, got none")
        return self._load(folder_of(self._root, name))

    def roll_back(self) -> Version:
        """Make the experts before the current ones current again; waits for the engine.

        Raises:
            RequestError: If there are none.
        """
        with self._changing:
            try:
                version: Version = self._engine.roll_back().result()
            except ValueError as error:
                raise RequestError(str(error)) from None
            self._record(version)
        return version

    def poll(self) -> None:
        """Load the newest bundle that has come since the last call.

        A refused one gives way to the next, and is tried again when its files have changed.

        Raises:
            QueueFullError: If the engine takes no change at the moment; the next call tries again.
        """
        assert self.watched is not None
        new = self.watched.new()
        for place, stamp in enumerate(new):
            try:
                self._load(stamp.folder)
            except RequestError:
                self.watched.refuse([stamp])
            else:
                # The rest is older than what is served now.
                self.watched.pass_over(new[place:])
                return

    def _load(self, folder: Path) -> Version:
        with self._changing:
            change: Future[Version] = self._engine.replace(lambda: load(self._model, folder))
            try:
                version = change.result()
            except FAULTS as error:
                LOG.error("bundle %s was refused: %s", folder.name, error)
                refusal = f"bundle {folder.name} was refused: {error}"
                raise RequestError(without_paths(refusal, folder)) from None
            self._folders[version.number] = folder
            self._record(version)
        LOG.warning("bundle %s is current, version %d", folder.name, version.number)
        return version

    def _record(self, version: Version) -> None:
        folder = self._folders.get(version.number)
        if self._root is not None and folder is not None and folder.parent == self._root:
            try:
                write_json(self._root / SERVED, {"name": folder.name})
            except OSError as error:
                LOG.error("a restart will not know that %s is served: %s", folder.name, error)


def without_paths(text: str, folder: Path) -> str:
    """The text with the server's folders left out."""
    for each in (folder.parent, folder.parent.resolve()):
        text = text.replace(f"{each}/", "")
    return text
