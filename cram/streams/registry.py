"""Streams by name or by file. A stream file lists the tasks in order, their files and their scorers.

    name: UCIT
    root: ${UCIT_ROOT}             # optional; relative to the stream file's folder; default: that folder
    images: datasets               # image root, relative to root; default: root
    tasks:
      - name: ImageNet-R
        train: ImageNet-R/train.json
        test: ImageNet-R/test.json
        scorer: accuracy
        max_new_tokens: 16
        images: other/folder       # optional, for this task
        references: captions.json  # optional, COCO captions of the test images
        repeated_ids: true         # optional, training ids may repeat

A stream that others have published also says what was published: `source` and `training` (learning rate and
the like) of the stream; `test_images`, `human_answers`, `test_suffix`, `counts`, `prompt` and `published` of
a task. `cram check` compares the data with it.

Everything is read and checked when the stream is loaded. So a fault in the last row of the last task is
reported before the first task is trained. Only reading a stream file needs PyYAML.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cram.scoring.scorers import SCORERS
from cram.streams.published import add_human_answers, with_suffix
from cram.streams.readers import PATH_ERRORS, StreamError, add_references, brief, is_folder, one_line
from cram.streams.splits import read_split
from cram.streams.types import Sample, Stream, Task
from cram.streams.yaml_file import line_of, load_yaml

# Streams of pictures drawn or composed on the spot, in `cram.streams.builtin`.
BUILTIN = ("builtin", "builtin-real", "builtin-20", "builtin-50")
SHIPPED = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")

# Key of a stream file or of a task -> (type, True if the key is required).
STREAM_KEYS: dict[str, tuple[type, bool]] = {
    "name": (str, True),
    "root": (str, False),
    "images": (str, False),
    "source": (str, False),
    "training": (dict, False),
    "tasks": (list, True),
}
TASK_KEYS: dict[str, tuple[type, bool]] = {
    "name": (str, True),
    "train": (str, True),
    "test": (str, True),
    "scorer": (str, True),
    "max_new_tokens": (int, True),
    "images": (str, False),
    "references": (str, False),
    "repeated_ids": (bool, False),
    "test_images": (str, False),
    "human_answers": (str, False),
    "test_suffix": (dict, False),
    "counts": (dict, False),
    "prompt": (str, False),
    "published": (str, False),
}


def load_stream(
    source: str | Path, seed: int = 0, limit: int | None = None, data_root: str | Path | None = None
) -> Stream:
    """Load a stream and check all of it.

    Args:
        source: A name in `BUILTIN` (six, ten, 20 or 50 tasks with pictures made on the spot), the name of a
            shipped stream file ("coin", "cvit", "mllm-acl", "mllm-dcl", "trigap", "ucit"), or the path of a
            stream file.
        seed: Seed of a built-in stream's pictures, or of the random choice that `limit` makes.
        limit: Maximum number of samples per split. A built-in stream draws that many. From a stream file's
            split that many are chosen at random and kept in file order.
        data_root: Replaces `root` of the stream file.

    Raises:
        StreamError: If anything in the stream file or in the files it names is wrong.
        ValueError: If `limit` is not positive or `source` is neither a name nor a file.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 sample per split, got {limit}")
    if source in BUILTIN:
        # Imported here, so that stream files load without the drawing code.
        from cram.streams.builtin import STREAMS, build

        own = STREAMS[str(source)]
        train, test = (min(limit or samples, samples) for samples in (own.train_samples, own.test_samples))
        return build(seed, train, test, str(source))
    stream = _read_stream(_stream_file(source), Path(data_root) if data_root is not None else None)
    return stream if limit is None else _thin_out(stream, limit, seed)


def stream_content(source: str | Path) -> tuple[Path, dict[str, Any]]:
    """The stream file that a name or a path stands for, and what it says, checked without its data.

    Raises:
        StreamError: If a key is missing, unknown or of another type.
        ValueError: If `source` is neither the name of a shipped stream file nor a file.
    """
    file = _stream_file(source)
    return file, _checked(file, load_yaml(file))


def stream_training(source: str | Path) -> dict[str, Any]:
    """The published settings of a stream file, as fields of the configuration; none for other streams."""
    if source in BUILTIN or not (str(source) in SHIPPED or Path(source).is_file()):
        return {}
    return dict(stream_content(source)[1].get("training", {}))


def _stream_file(source: str | Path) -> Path:
    shipped = SHIPPED.get(str(source))
    path = shipped or Path(source)
    if not path.is_file():
        names = [*BUILTIN, *SHIPPED]
        raise ValueError(f"stream must be one of {names} or the path of a stream file, got {str(source)!r}")
    return path


def _read_stream(file: Path, data_root: Path | None) -> Stream:
    content = load_yaml(file)
    try:
        return _described_stream(file, content, data_root)
    except StreamError as error:
        if error.file != file:
            raise
        raise error.at_line(line_of(file, error.field)) from error


def _described_stream(file: Path, content: Any, data_root: Path | None) -> Stream:
    described = _checked(file, content)
    entries = described["tasks"]
    root = _root(file, described.get("root"), data_root)
    images = described.get("images", ".")
    tasks = [_read_task(file, f"tasks[{i}]", entry, root, images) for i, entry in enumerate(entries)]
    return Stream(described["name"], tuple(tasks))


def _checked(file: Path, content: Any) -> dict[str, Any]:
    described = _check_keys(file, "", content, STREAM_KEYS)
    if not described["tasks"]:
        raise StreamError(file, None, "tasks", "must list at least one task, got none")
    entries = [_check_task(file, f"tasks[{i}]", entry) for i, entry in enumerate(described["tasks"])]
    names = [entry["name"] for entry in entries]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise StreamError(file, None, f"tasks[{index}].name", f"must be unique, got {name!r} again")
    return described


def _check_task(file: Path, where: str, entry: object) -> dict[str, Any]:
    task = _check_keys(file, f"{where}.", entry, TASK_KEYS)
    if not NAME_PATTERN.fullmatch(task["name"]):
        raise StreamError(
            file, None, f"{where}.name", f"must match {NAME_PATTERN.pattern}, got {brief(task['name'])}"
        )
    if task["scorer"] not in SCORERS:
        raise StreamError(
            file, None, f"{where}.scorer", f"must be one of {sorted(SCORERS)}, got {brief(task['scorer'])}"
        )
    if task["max_new_tokens"] < 1:
        raise StreamError(
            file, None, f"{where}.max_new_tokens", f"must be at least 1, got {brief(task['max_new_tokens'])}"
        )
    if task.get("published", task["scorer"]) not in SCORERS:
        raise StreamError(
            file, None, f"{where}.published", f"must be a scorer, got {brief(task['published'])}"
        )
    counts = task.get("counts", {})
    if not counts.keys() <= {"train", "test"} or not all(type(n) is int and n > 0 for n in counts.values()):
        raise StreamError(
            file, None, f"{where}.counts", f"must be numbers of train and test, got {brief(counts)}"
        )
    suffix = task.get("test_suffix", {})
    if not all(isinstance(text, str) for pair in suffix.items() for text in pair):
        raise StreamError(file, None, f"{where}.test_suffix", f"must be texts by answer, got {brief(suffix)}")
    return task


def _read_task(file: Path, where: str, entry: dict[str, Any], root: Path, images: str) -> Task:
    image_root = _inside(file, f"{where}.images", root, entry.get("images", images))
    if not is_folder(image_root):
        raise StreamError(file, None, f"{where}.images", f"must be a folder, got {brief(str(image_root))}")
    train = read_split(
        _inside(file, f"{where}.train", root, entry["train"]), image_root, entry.get("repeated_ids", False)
    )
    seen_root = _inside(
        file, f"{where}.test_images", root, entry.get("test_images", entry.get("images", images))
    )
    test = read_split(_inside(file, f"{where}.test", root, entry["test"]), seen_root)
    if "references" in entry:
        test = add_references(test, _inside(file, f"{where}.references", root, entry["references"]))
    if "human_answers" in entry:
        test = add_human_answers(test, _inside(file, f"{where}.human_answers", root, entry["human_answers"]))
    test = with_suffix(test, entry.get("test_suffix", {}))
    return Task(entry["name"], train, test, entry["scorer"], entry["max_new_tokens"], entry.get("published"))


def _root(file: Path, described: str | None, data_root: Path | None) -> Path:
    if data_root is not None:
        root = data_root
    else:
        expanded = os.path.expandvars(described or ".")
        if "$" in expanded:
            raise StreamError(
                file, None, "root", f"must be set (the environment variable or data_root), got {described!r}"
            )
        try:
            root = file.parent / Path(expanded).expanduser()
        except RuntimeError as error:
            raise StreamError(
                file, None, "root", f"must be a folder, got {brief(described)}: {error}"
            ) from error
    if not is_folder(root):
        raise StreamError(file, None, "root", f"must be an existing folder, got {brief(str(root))}")
    return root


def _inside(file: Path, field: str, root: Path, name: str) -> Path:
    path = root / name
    try:
        inside = path.resolve().is_relative_to(root.resolve())
    except PATH_ERRORS as error:
        raise StreamError(
            file, None, field, f"must be a path, got {brief(name)}: {one_line(error)}"
        ) from error
    if not inside:
        raise StreamError(file, None, field, f"must stay under the root {root}, got {brief(name)}")
    return path


def _check_keys(
    file: Path, prefix: str, content: object, keys: dict[str, tuple[type, bool]]
) -> dict[str, Any]:
    """Return `content` if it has all required keys, no unknown key, and values of the right types."""
    place = prefix.rstrip(".") or "(file)"
    if not isinstance(content, dict):
        raise StreamError(file, None, place, f"must be a mapping, got {brief(content)}")
    unknown = [key for key in content if key not in keys]
    if unknown:
        raise StreamError(
            file, None, f"{prefix}{_key(unknown[0])}", f"is not a known key; known are {sorted(keys)}"
        )
    for key, (kind, required) in keys.items():
        if key not in content:
            if required:
                raise StreamError(file, None, f"{prefix}{key}", "must be present, got nothing")
            continue
        value = content[key]
        if type(value) is not kind or value == "":
            raise StreamError(
                file,
                None,
                f"{prefix}{key}",
                f"must be a {kind.__name__} that is not empty, got {brief(value)}",
            )
    return content


def _key(key: object) -> str:
    return key if isinstance(key, str) and key.isidentifier() else brief(key)


def _thin_out(stream: Stream, limit: int, seed: int) -> Stream:
    def choose(samples: Sequence[Sample], split: str) -> Sequence[Sample]:
        if len(samples) <= limit:
            return samples
        chosen = random.Random(f"{seed}/{split}").sample(range(len(samples)), limit)
        return [samples[index] for index in sorted(chosen)]

    tasks = tuple(
        Task(
            task.name,
            choose(task.train, f"{task.name}/train"),
            choose(task.test, f"{task.name}/test"),
            task.scorer,
            task.max_new_tokens,
            task.published,
        )
        for task in stream.tasks
    )
    return Stream(stream.name, tasks)
