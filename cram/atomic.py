"""Files and folders that are either the old ones or the new ones, whatever moment the process dies at.

A file is written under a temporary name on the same filesystem, flushed to the disk and renamed. A folder is
built beside its place, flushed and renamed; where it replaces another one, the old one steps aside under a
fixed name first, and `recover_folder` puts it back if the process died between the two renames.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PARTIAL = ".partial"
PREVIOUS = ".previous"
LOCK = ".lock"


def _sibling(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}{suffix}")


def fsync_path(path: Path) -> None:
    """Flush a file's or a folder's entry to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new one, never a part."""
    partial = _sibling(path, PARTIAL)
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    fsync_path(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically; NaN and infinity are refused, since JSON has neither."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, max_bytes: int | None = None) -> Any:
    """Read a JSON file.

    Args:
        path: A regular file, so that nothing waits for the writer of a pipe.
        max_bytes: A larger file is refused before it is read.

    Raises:
        ValueError: If the file is larger, is no regular file, or is not JSON (which has no NaN).
        OSError: If there is no such file.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} must be a JSON file, got something that is no file")
    if max_bytes is not None and status.st_size > max_bytes:
        raise ValueError(f"{path} must have at most {max_bytes} bytes, got {status.st_size}")
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be a JSON file, got {error}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"the constant {name}")


def recover_folder(path: Path) -> None:
    """Put the previous folder back if a replacement was cut between its two renames."""
    previous = _sibling(path, PREVIOUS)
    if previous.is_dir() and not path.exists():
        os.rename(previous, path)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a folder alone; the hold ends with the block or with the process, however that ends.

    The folder is made if it is absent, and taken away again if the block leaves it empty.

    Raises:
        ValueError: If another process, or another block of this one, holds it.
    """
    file = path / LOCK
    handle = _lock(file, path)
    try:
        os.truncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        yield
    finally:
        try:
            # Before it is let go: who locks a file that has lost its name takes the next one.
            os.unlink(file)
            with suppress(OSError):  # It is not empty.
                os.rmdir(path)
        finally:
            os.close(handle)


def _lock(file: Path, folder: Path) -> int:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(file) and os.path.samestat(os.fstat(handle), os.stat(file)):
                return handle
        except BlockingIOError as error:
            owner = os.pread(handle, 20, 0).decode(errors="replace").strip()
            os.close(handle)
            raise ValueError(
                f"{folder} must have one writer, got process {owner or '?'} at work there"
            ) from error
        os.close(handle)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder to fill; after the block it takes the place of `path`.

    A block that raises (or a process that dies in it) leaves `path` as it was; the next attempt wipes what
    it left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(path)
    partial, previous = _sibling(path, PARTIAL), _sibling(path, PREVIOUS)
    for leftover in (partial, previous):
        if leftover.exists():
            shutil.rmtree(leftover)
    partial.mkdir()
    yield partial
    for folder, _, files in os.walk(partial):
        for name in files:
            fsync_path(Path(folder, name))
        fsync_path(Path(folder))
    if path.exists():
        os.rename(path, previous)
    os.rename(partial, path)
    fsync_path(path.parent)
    if previous.exists():
        shutil.rmtree(previous)
