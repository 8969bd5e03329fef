"""Stream files and data made to hang, to fill the memory or to break the reader: one line names the place."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cram.streams import StreamError, load_stream
from cram.streams.yaml_file import load_yaml
from tests.cram.streams.layouts import conversation, dump, picture

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
STREAMS: dict[str, tuple[str, str]] = {
    "deep list": ("name: " + "[" * 5000, "'.file.': must be YAML"),
    "deep mapping": ("{a: " * 5000, "'.file.': must be YAML"),
    "one level too many": ("name: x\ntasks: " + "[" * 100 + "]" * 100, "more than 100 levels"),
    "an integer that is none": ("name: !!int ''", "'.file.': must be YAML"),
    "a truth value that is none": ("name: !!bool x", "'.file.': must be YAML"),
    "a time that is none": ("name: !!timestamp x", "'.file.': must be YAML"),
    "a day that is none": ("name: 2001-99-99", "'.file.': must be YAML"),
    "a key that is a list": ("? [a]\n: b", "'.file.': must be YAML"),
    "aliases of aliases": (f"{BOMB}tasks: *a59\nname: x", "'a0': is not a known key"),
    "aliases of aliases as a name": (
        f"name: &x\n{BOMB}".replace("\na", "\n  a") + "tasks: []",
        "'name': must be a str",
    ),
    "aliases of aliases as a task": (
        f"name: x\ntasks:\n- {BOMB}".replace("\na", "\n  a"),
        r"'tasks\[0\].a0'",
    ),
    "a list of itself": ("name: x\ntasks: &a [*a]", r"'tasks\[0\]': must be a mapping"),
    "a number too long to print": ("name: 0x" + "f" * 9000, "'name': must be a str"),
    "an unknown user": ("name: x\nroot: ~nouser\ntasks: [1]", r"'tasks\[0\]': must be a mapping"),
    "a key of two lines": ('"a\\nb": 1', "is not a known key"),
    "a large file": ("# " + "x" * (1 << 20), "must have at most"),
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_hostile_stream_file_is_refused_in_one_line_at_once(tmp_path: Path, name: str) -> None:
    text, message = STREAMS[name]
    file = tmp_path / "stream.yaml"
    file.write_text(text)
    start = time.process_time()
    with pytest.raises(StreamError, match=rf"stream\.yaml, field .*{message}") as refused:
        load_stream(file)
    assert time.process_time() - start < 2
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 1000


def test_as_many_levels_as_a_file_may_have_are_read(tmp_path: Path) -> None:
    file = tmp_path / "stream.yaml"
    file.write_text("tasks: " + "[" * 99 + "]" * 99)
    assert list(load_yaml(file)) == ["tasks"]


def toy(folder: Path, **changes: Any) -> dict[str, Any]:
    """A stream of one task with references, on disk."""
    picture(folder / "a.png")
    dump(folder / "train.json", [conversation("0", "a.png", "<image>\nq", "a")])
    dump(folder / "test.json", [{"question_id": "0", "image": "a.png", "text": "q", "answer": "a"}])
    dump(folder / "coco.json", {"images": [{"id": 0}], "annotations": [{"image_id": 0, "caption": "c"}]})
    task = {
        "name": "one",
        "train": "train.json",
        "test": "test.json",
        "scorer": "coco_caption",
        "max_new_tokens": 2,
        "references": "coco.json",
    }
    return {"name": "toy", "tasks": [{**task, **changes}]}


def write(folder: Path, content: dict[str, Any]) -> Path:
    (folder / "stream.yaml").write_text(yaml.safe_dump(content))
    return folder / "stream.yaml"


def row(**changes: Any) -> Callable[[Path], None]:
    """Rewrites the test row."""
    row = {"question_id": "0", "image": "a.png", "text": "q", "answer": "a"}
    return lambda folder: dump(folder / "test.json", [{**row, **changes}])


def coco(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: dump(folder / "coco.json", {"images": [], "annotations": [], **changes})


def loop(name: str) -> Callable[[Path], None]:
    """A link to itself in place of a file."""

    def apply(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(folder / name)

    return apply


def pipe(name: str) -> Callable[[Path], None]:
    """A pipe without a writer in place of a file."""

    def apply(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return apply


def text(name: str, content: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).write_text(content)

    return apply


DATA: dict[str, tuple[Callable[[Path], None], str]] = {
    "a picture that links to itself": (loop("a.png"), r"train\.json, row 0, field 'image'"),
    "a file that links to itself": (loop("test.json"), r"stream\.yaml, field 'tasks\[0\]\.test'"),
    "a pipe for the rows": (pipe("test.json"), r"test\.json, field '.file.': must be a readable file"),
    "a pipe for the references": (pipe("coco.json"), r"coco\.json, field '.file.': must be a readable file"),
    "a pipe for a picture": (pipe("a.png"), r"row 0, field 'image': must be an existing file"),
    "a folder for the rows": (
        lambda f: ((f / "test.json").unlink(), (f / "test.json").mkdir()),
        r"test\.json, field '.file.': must be a readable file",
    ),
    "huge rows": (
        lambda f: os.truncate(f / "test.json", 64 << 30),
        r"test\.json, field '.file.': must have at most \d+ bytes, got 68719476736",
    ),
    "huge references": (
        lambda f: os.truncate(f / "coco.json", 64 << 30),
        r"coco\.json, field '.file.': must have at most \d+ bytes",
    ),
    "images that are null": (coco(images=None), r"coco\.json, field 'images': must be a list, got None"),
    "annotations that are null": (coco(annotations=None), "field 'annotations': must be a list, got None"),
    "annotations that are a number": (coco(annotations=3), "field 'annotations': must be a list, got 3"),
    "annotations that are an object": (coco(annotations={"a": 1}), "field 'annotations': must be a list"),
    "a null byte in a picture's name": (row(image="\0"), r"test\.json, row 0, field 'image': must be a path"),
    "a picture's name that is too long": (row(image="x" * 5000), r"row 0, field 'image': must be a path"),
    "half a character in a picture's name": (row(image="\ud800"), r"row 0, field 'image': must be a path"),
    "half a character in an id": (row(question_id="\ud800"), r"row 0, field 'question_id': must be"),
    "half a character in a question": (row(text="\ud800"), r"row 0, field 'text': must be"),
    "half a character in an answer": (row(answer=["\udfff"]), r"row 0, field 'answer': must be"),
    "an infinite answer": (
        text("test.json", '[{"question_id": 1, "text": "q", "answer": 1e999}]'),
        "'answer'",
    ),
    "an answer that is no number": (
        text("test.json", '[{"question_id": 1}, {"question_id": 2, "text": "q", "answer": NaN}]'),
        r"test\.json, row 1, field '.row.': must be JSON, got the constant NaN",
    ),
    "a number of many digits": (
        text("test.json", "[" + "9" * 5000 + "]"),
        r"test\.json, field '.file.': must be",
    ),
    "deep rows": (text("test.json", "[" * 100_000), r"test\.json, field '.file.': must be JSON"),
}


@pytest.mark.parametrize("name", DATA)
def test_hostile_data_is_refused_in_one_line_at_once(tmp_path: Path, name: str) -> None:
    damage, message = DATA[name]
    file = write(tmp_path, toy(tmp_path))
    assert load_stream(file).tasks[0].test[0].accepted == ("c",)
    damage(tmp_path)
    start = time.process_time()
    with pytest.raises(StreamError, match=message) as refused:
        load_stream(file)
    assert time.process_time() - start < 2
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 1500


@pytest.mark.parametrize("root", ["~nouser-of-that-name", "a\0b", "x" * 5000])
def test_a_root_that_cannot_be_is_refused(tmp_path: Path, root: str) -> None:
    content = {**toy(tmp_path), "root": root}
    with pytest.raises(StreamError, match=r"stream\.yaml, field 'root': must be a"):
        load_stream(write(tmp_path, content))


@pytest.mark.parametrize("field", ["train", "images", "references"])
@pytest.mark.parametrize("value", ["a\0b", "x" * 5000])
def test_a_path_that_cannot_be_is_refused(tmp_path: Path, field: str, value: str) -> None:
    file = write(tmp_path, toy(tmp_path, **{field: value}))
    with pytest.raises(StreamError, match="must be a"):
        load_stream(file)
    assert json.loads((tmp_path / "test.json").read_text())
