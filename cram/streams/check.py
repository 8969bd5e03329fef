"""Compares a stream's data with what its file says was published, and describes it by counts and hashes.

A picture is known by its path, or with `pictures` by the bytes of its file. A question that stands in both
splits with the same pictures is a fault; a `test_suffix` is no part of a question here. Pictures that both
splits share are counted: many benchmarks ask several questions about one picture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cram.streams.pictures import encoded
from cram.streams.published import without_suffix
from cram.streams.types import Sample, Stream, Task, open_images

SHOWN = 12


def check_stream(stream: Stream, described: Mapping[str, Any], pictures: bool = False) -> dict[str, Any]:
    """Return the manifest of a stream: counts, hashes and faults.

    Args:
        stream: The stream, with its data.
        described: What its file says (`cram.streams.registry.stream_content`); empty for none.
        pictures: True opens every picture and hashes its bytes.

    Raises:
        ValueError: If a picture cannot be read.
    """
    entries = {entry["name"]: entry for entry in described.get("tasks", [])}
    tasks = [_check_task(task, entries.get(task.name, {}), pictures) for task in stream.tasks]
    faults = [f"{task['name']}: {fault}" for task in tasks for fault in task.pop("faults")]
    source = described.get("source", "")
    return {"stream": stream.name, "source": source, "tasks": tasks, "faults": faults}


def manifest_lines(manifest: Mapping[str, Any]) -> list[str]:
    """Return a manifest as lines of text."""
    lines = [f"{manifest['stream']}  {manifest['source']}".rstrip()]
    for task in manifest["tasks"]:
        train, test = task["train"], task["test"]
        lines.append(
            f"  {task['name']:20} train {train['samples']:7} {train['sha256'][:SHOWN]}  "
            f"test {test['samples']:6} {test['sha256'][:SHOWN]}  "
            f"pictures {train['pictures']} and {test['pictures']}, {task['shared_pictures']} in both"
        )
        if task["prompted"] is not None:
            lines.append(f"  {'':20} the published prompt is in {task['prompted']:.1f} % of the questions")
    return [*lines, *(f"  FAULT {fault}" for fault in manifest["faults"])]


def _check_task(task: Task, entry: Mapping[str, Any], pictures: bool) -> dict[str, Any]:
    train, test = (_known(split, pictures) for split in (task.train, task.test))
    faults = [
        f"must have {wanted} {name} samples, got {len(split)}"
        for name, split in (("train", task.train), ("test", task.test))
        if (wanted := entry.get("counts", {}).get(name, len(split))) != len(split)
    ]
    suffix = entry.get("test_suffix", {})
    leaked = _asked(task.train, train, suffix) & _asked(task.test, test, suffix)
    if leaked:
        question, _ = min(leaked)
        faults.append(f"{len(leaked)} test questions are in the training data, such as {question!r:.80}")
    shared = set().union(*train) & set().union(*test)
    prompt = entry.get("prompt")
    return {
        "name": task.name,
        "train": _described(task.train, train),
        "test": _described(task.test, test),
        "shared_pictures": len(shared),
        "prompted": None if prompt is None else _prompted((*task.train, *task.test), prompt),
        "faults": faults,
    }


def _known(samples: Sequence[Sample], pictures: bool) -> list[tuple[str, ...]]:
    """What the pictures of every sample are known by."""
    return [_pictures(sample, pictures) for sample in samples]


def _pictures(sample: Sample, opened: bool) -> tuple[str, ...]:
    if opened:
        open_images(sample)
    names = []
    for image in sample.images:
        if isinstance(image, Path):
            names.append(hashlib.sha256(image.read_bytes()).hexdigest() if opened else str(image))
        else:
            kept = encoded(image)
            names.append(hashlib.sha256((kept.open() if kept else image).tobytes()).hexdigest())
    return tuple(names)


def _asked(
    samples: Iterable[Sample], known: Iterable[tuple[str, ...]], suffix: Mapping[str, str]
) -> set[tuple[str, tuple[str, ...]]]:
    return {(without_suffix(sample, suffix), names) for sample, names in zip(samples, known, strict=True)}


def _described(samples: Sequence[Sample], known: Sequence[tuple[str, ...]]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for sample, names in zip(samples, known, strict=True):
        shown = [Path(name).name for name in names]
        digest.update(repr((sample.id, sample.instruction, sample.accepted, shown)).encode())
    count = len(set().union(*known)) if known else 0
    return {"samples": len(samples), "pictures": count, "sha256": digest.hexdigest()}


def _prompted(samples: Sequence[Sample], prompt: str) -> float:
    return 100 * sum(prompt in sample.instruction for sample in samples) / len(samples)
