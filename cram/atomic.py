"""Files and folders that are either the old ones or the new ones, whatever moment the process dies at.

A file is written under a temporary name on the same filesystem, flushed to the disk and renamed. A folder is
built beside its place, flushed and renamed; where it replaces another one, the old one steps aside under a
fixed name first, and `recover_folder` puts it back if the process died between the two renames.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTIAL = ".partial"
PREVIOUS = ".previous"


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


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: If the file is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} must be a JSON file, got {error}") from error


def recover_folder(path: Path) -> None:
    """Put the previous folder back if a replacement was cut between its two renames."""
    previous = _sibling(path, PREVIOUS)
    if previous.is_dir() and not path.exists():
        os.rename(previous, path)


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
