"""Stream files and their data under damage: each loads whole, or is refused in one line with its place."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random
from typing import Any

import yaml

from cram.streams import Stream, load_stream
from cram.streams.types import open_images
from tests.cram.streams.layouts import conversation, dump, picture
from tests.fuzz.guard import Tally, attempt, fault_of_refusal
from tests.fuzz.mutate import mutate_bytes, mutate_json, mutate_json_file, mutate_tree

PICTURES = ("a.png", "b.jpg", "c.bmp", "d.gif", "e.webp")


def prepare(folder: Path) -> Path:
    """A stream of two tasks with pictures of every kind and with references."""
    for name in PICTURES:
        picture(folder / "pictures" / name, (24, 16))
    rows = [conversation(str(i), name, "<image>\nWhat is it?", "a b") for i, name in enumerate(PICTURES)]
    asked = [
        {"question_id": i, "image": name, "text": "What?", "answer": ["a", "b"]}
        for i, name in enumerate(PICTURES)
    ]
    captions = [{"image_id": i, "caption": f"caption {i}"} for i in range(len(PICTURES))]
    images = [{"id": i, "file_name": name} for i, name in enumerate(PICTURES)]
    dump(folder / "train.json", [*rows, conversation("9", None, "Why?", "so")])
    dump(folder / "test.json", asked)
    dump(folder / "coco.json", {"images": images, "annotations": captions})
    task = {"train": "train.json", "test": "test.json", "max_new_tokens": 4}
    tasks = [
        {"name": "one", "scorer": "accuracy", "repeated_ids": True, **task},
        {"name": "two", "scorer": "coco_caption", "references": "coco.json", **task},
    ]
    described = {"name": "toy", "root": ".", "images": "pictures", "tasks": tasks}
    (folder / "stream.yaml").write_text(yaml.safe_dump(described))
    return folder


def damage(folder: Path, random: Random) -> str:
    """Change one file of a stream."""
    file = random.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    kind = random.choice(("bytes", "tree", "fields", "fields", "fields"))
    if kind == "tree":
        return f"{file.name}: {mutate_tree(folder, file, random)}"
    if kind == "fields" and file.suffix == ".json":
        return f"{file.name}: {mutate_json_file(file, random)}"
    if kind == "fields" and file.suffix == ".yaml":
        value, said = mutate_json(yaml.safe_load(file.read_text()), random)
        text = yaml.safe_dump(value, allow_unicode=random.random() < 0.5)
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        return f"{file.name}: {said}"
    content, said = mutate_bytes(file.read_bytes(), random)
    file.write_bytes(content)
    return f"{file.name}: {said}"


def fault_of_stream(stream: Any) -> str | None:
    """What no stream may hold, or None."""
    if not isinstance(stream, Stream) or not isinstance(stream.name, str) or not stream.name:
        return f"no stream: {stream!r:.100}"
    for task in stream.tasks:
        if type(task.max_new_tokens) is not int or task.max_new_tokens < 1:
            return f"max_new_tokens {task.max_new_tokens!r:.100}"
        for sample in (*task.train, *task.test):
            said = (sample.id, sample.instruction, *sample.accepted)
            if not all(isinstance(text, str) and text.strip() and text.encode() for text in said):
                return f"a sample without words: {said!r:.200}"
    return None


def check(folder: Path) -> tuple[str, str | None]:
    """What came of a damaged stream: its kind, and what is wrong with that."""
    found = attempt(lambda: load_stream(folder / "stream.yaml"))
    if found.error is not None:
        return "refused", fault_of_refusal(found.error, folder)
    if fault := fault_of_stream(found.value):
        return "loaded", fault
    for task in found.value.tasks:
        for sample in (*task.train, *task.test):
            opened = attempt(lambda each=sample: open_images(each))
            if opened.error is not None:
                return "picture refused", fault_of_refusal(opened.error, folder)
    return "loaded", None


def run(whole: Path, seeds: range, place: Path) -> Tally:
    """One mutation per seed."""
    tally = Tally()
    for seed in seeds:
        random = Random(seed)
        folder = place / str(seed) / "stream"
        shutil.copytree(whole, folder)
        said = damage(folder, random)
        with tally.timed(seed):
            kind, fault = check(folder)
        tally.add(kind, seed, said, fault)
        shutil.rmtree(place / str(seed))
    return tally
