"""One split of a stream file: a file of rows in any of the known forms, or a data set of Hugging Face."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cram.streams.messages import samples_of
from cram.streams.readers import StreamError, is_folder, load_rows, one_line, samples_of_rows
from cram.streams.types import Sample

# Keys of the rows that `cram.streams.messages` reads; `cram.streams.readers` reads the other two layouts.
MESSAGE_KEYS = {"messages", "prompt"}


def read_split(path: Path, image_root: Path, repeated_ids: bool = False) -> list[Sample]:
    """The samples of one split.

    Args:
        path: JSON, JSON lines, or the folder that `Dataset.save_to_disk` has written.
        image_root: Folder that every picture given by path must lie in.
        repeated_ids: See `cram.streams.readers.read_samples`.

    Raises:
        StreamError: For the first fault found; rows count from 0.
    """
    if is_folder(path):
        return samples_of(_rows_on_disk(path), path, image_root, repeated_ids)
    rows = load_rows(path)
    if any(isinstance(row, dict) and MESSAGE_KEYS & row.keys() for row in rows):
        return samples_of(rows, path, image_root, repeated_ids)
    return samples_of_rows(path, rows, image_root, repeated_ids)


def _rows_on_disk(folder: Path) -> Iterable[Any]:
    if (folder / "dataset_dict.json").is_file():
        parts = sorted(part.name for part in folder.iterdir() if part.is_dir())
        raise StreamError(
            folder, None, "(file)", f"must be one split, got {parts}; name {folder.name}/<split>"
        )
    if not (folder / "dataset_info.json").is_file():
        fault = "must be a readable file or a data set of save_to_disk, got a folder of another kind"
        raise StreamError(folder, None, "(file)", fault)
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise StreamError(
            folder,
            None,
            "(file)",
            "must be read by the package datasets, got none; pip install '.[data]'",
        ) from error
    try:
        rows: Iterable[Any] = load_from_disk(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise StreamError(folder, None, "(file)", f"must be a data set, got {one_line(error)}") from error
    return rows
