"""Stream files: the shipped ones on data in their layouts, and every fault before anything is used."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml

from cram.streams import StreamError, load_stream, open_images
from cram.streams.registry import BUILTIN, SHIPPED
from cram.streams.types import Sample, Stream, Task
from tests.cram.streams.layouts import CAPTION_TASKS, conversation, dump, picture, write_benchmark

ORDERS = {
    "ucit": ["ImageNet-R", "ArxivQA", "VizWiz", "IconQA", "CLEVR-Math", "Flickr30k"],
    "trigap": [
        "PMCVQA", "DocVQA", "ChartQA", "IconQA", "InfographicVQA", "ArxivQA", "Roadside", "ChemVQA",
        "FloodNetVQA", "CLEVR",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", ORDERS)
def test_shipped_streams_load_from_their_layout(name: str, tmp_path: Path) -> None:
    write_benchmark(tmp_path, SHIPPED[name])
    stream = load_stream(name, data_root=tmp_path)
    assert [task.name for task in stream.tasks] == ORDERS[name]
    for task in stream.tasks:
        assert [s.instruction for s in task.train] == [s.instruction for s in task.test]
        assert [s.answer for s in task.train] == [f"answer {i}" for i in range(3)]
        assert open_images(task.test[2])[0].size == (8, 6)
    scorers = {task.name: task.scorer for task in stream.tasks}
    if name == "ucit":
        assert {n for n, scorer in scorers.items() if scorer == "coco_caption"} == set(CAPTION_TASKS)
        assert stream.tasks[5].test[1].accepted == ("caption 1 0", "caption 1 1")
    else:
        assert {n for n, scorer in scorers.items() if scorer == "anls"} == {"DocVQA", "InfographicVQA"}


def test_root_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_benchmark(tmp_path, SHIPPED["ucit"])
    monkeypatch.setenv("UCIT_ROOT", str(tmp_path))
    assert len(load_stream("ucit").tasks) == 6
    monkeypatch.delenv("UCIT_ROOT")
    with pytest.raises(StreamError, match=r"'root': must be set .* got '\$\{UCIT_ROOT\}'"):
        load_stream("ucit")


def toy(folder: Path) -> dict[str, Any]:
    """A two-task stream file's content, with its data on disk."""
    tasks = []
    for name in ("first", "second"):
        picture(folder / "images" / f"{name}.png")
        rows = [conversation(f"{i}", f"{name}.png", f"<image>\n{i}?", f"{i}") for i in range(20)]
        dump(folder / f"{name}/train.json", rows)
        dump(folder / f"{name}/test.json", rows[:10])
        tasks.append(
            {
                "name": name,
                "train": f"{name}/train.json",
                "test": f"{name}/test.json",
                "scorer": "accuracy",
                "max_new_tokens": 8,
            }
        )
    return {"name": "toy", "images": "images", "tasks": tasks}


def load(folder: Path, content: Any, **options: Any) -> Stream:
    (folder / "stream.yaml").write_text(yaml.safe_dump(content))
    return load_stream(folder / "stream.yaml", **options)


def test_toy_stream(tmp_path: Path) -> None:
    stream = load(tmp_path, toy(tmp_path))
    assert stream.name == "toy"
    assert [(len(task.train), len(task.test)) for task in stream.tasks] == [(20, 10)] * 2
    assert isinstance(stream.tasks[0].train[0].images[0], Path)


def test_a_task_may_have_its_own_image_root(tmp_path: Path) -> None:
    content = toy(tmp_path)
    (tmp_path / "images/second.png").rename(tmp_path / "second/second.png")
    content["tasks"][1]["images"] = "second"
    images = load(tmp_path, content).tasks[1].test[0].images
    assert images == (tmp_path / "second/second.png",)


def test_limit_thins_out_by_seed(tmp_path: Path) -> None:
    content = toy(tmp_path)

    def ids(seed: int) -> list[list[str]]:
        stream = load(tmp_path, content, seed=seed, limit=12)
        return [[s.id for s in split] for task in stream.tasks for split in (task.train, task.test)]

    first = ids(0)
    assert [len(split) for split in first] == [12, 10, 12, 10]
    assert first == ids(0) != ids(1)
    assert all(split == sorted(split, key=int) for split in first)
    with pytest.raises(ValueError, match="limit must be at least 1 sample per split, got 0"):
        load_stream("ucit", limit=0)


def set_in_task(**changes: Any) -> Any:
    def change(content: dict[str, Any], folder: Path) -> None:
        content["tasks"][1].update(changes)

    return change


def damage_last_row(content: dict[str, Any], folder: Path) -> None:
    rows = [conversation(f"{i}", "second.png", "q", "a") for i in range(10)]
    rows[9]["image"] = "absent.png"
    dump(folder / "second/test.json", rows)


FAULTS: dict[str, tuple[Any, str]] = {
    "unknown key": (
        lambda c, f: c.update(batch=3),
        r"stream.yaml, field 'batch': is not a known key; known are",
    ),
    "unknown task key": (
        set_in_task(epochs=3),
        r"stream.yaml, field 'tasks\[1\].epochs': is not a known key",
    ),
    "missing key": (lambda c, f: c.pop("name"), "field 'name': must be present, got nothing"),
    "missing task key": (lambda c, f: c["tasks"][1].pop("test"), r"field 'tasks\[1\].test': must be present"),
    "no tasks": (lambda c, f: c.update(tasks=[]), "field 'tasks': must list at least one task"),
    "task that is no mapping": (lambda c, f: c.update(tasks=["x"]), r"field 'tasks\[0\]': must be a mapping"),
    "wrong type": (
        set_in_task(max_new_tokens="8"),
        r"max_new_tokens': must be a int that is not empty, got '8'",
    ),
    "bool for int": (set_in_task(max_new_tokens=True), "max_new_tokens': must be a int"),
    "no new tokens": (set_in_task(max_new_tokens=0), "max_new_tokens': must be at least 1, got 0"),
    "empty text": (set_in_task(train=""), r"tasks\[1\].train': must be a str that is not empty, got ''"),
    "unknown scorer": (set_in_task(scorer="bleurt"), r"tasks\[1\].scorer': must be one of .* got 'bleurt'"),
    "repeated name": (set_in_task(name="first"), r"tasks\[1\].name': must be unique, got 'first' again"),
    "name with a path": (set_in_task(name="../x"), r"tasks\[1\].name': must match"),
    "escaping file": (set_in_task(train="../x.json"), r"tasks\[1\].train': must stay under the root"),
    "escaping images": (set_in_task(images="/tmp"), r"tasks\[1\].images': must stay under the root"),
    "escaping references": (
        set_in_task(references="../x"),
        r"tasks\[1\].references': must stay under the root",
    ),
    "absent images": (set_in_task(images="nowhere"), r"tasks\[1\].images': must be a folder"),
    "absent file": (
        set_in_task(train="nowhere.json"),
        "nowhere.json, field '.file.': must be a readable file",
    ),
    "absent root": (lambda c, f: c.update(root="nowhere"), "field 'root': must be an existing folder"),
    "empty task": (lambda c, f: dump(f / "second/test.json", []), "must be a non-empty list of rows, got"),
    "fault in the very last row": (
        damage_last_row,
        "second/test.json, row 9, field 'image': must be an existing",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(fault: str, tmp_path: Path) -> None:
    damage, message = FAULTS[fault]
    content = toy(tmp_path)
    damage(content, tmp_path)
    with pytest.raises(StreamError, match=message):
        load(tmp_path, content)


def test_repeated_ids_of_test_data_are_refused_even_where_training_ids_may_repeat(tmp_path: Path) -> None:
    content = toy(tmp_path)
    rows = [conversation("same", "second.png", "q", "a")] * 2
    dump(tmp_path / "second/train.json", rows)
    with pytest.raises(
        StreamError, match=r"second/train.json, row 1, field 'id': must be unique.*repeated_ids"
    ):
        load(tmp_path, content)
    content["tasks"][1]["repeated_ids"] = True
    assert [s.id for s in load(tmp_path, content).tasks[1].train] == ["same", "same#1"]
    dump(tmp_path / "second/test.json", rows)
    with pytest.raises(StreamError, match="second/test.json, row 1, field 'id': must be unique"):
        load(tmp_path, content)


@pytest.mark.parametrize("text", ["a: [", "- just\n- a list", "", "!!python/object/apply:os.getcwd []"])
def test_files_that_are_no_stream_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "stream.yaml").write_text(text)
    with pytest.raises(StreamError, match="stream.yaml, field '.file.': must be"):
        load_stream(tmp_path / "stream.yaml")


def test_unknown_source_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"stream must be one of \['builtin', 'builtin-real', 'builtin-20', 'builtin-50', 'coin', ",
    ):
        load_stream("trigrap")


@pytest.mark.parametrize("name", BUILTIN)
@pytest.mark.parametrize(
    ("limit", "sizes"), [(None, (240, 25)), (3, (3, 3)), (100, (100, 25)), (999, (240, 25))]
)
def test_builtin_streams_are_drawn_by_their_own_module(
    monkeypatch: pytest.MonkeyPatch, name: str, limit: int | None, sizes: tuple[int, int]
) -> None:
    def build(seed: int, train_samples: int, test_samples: int, name: str) -> Stream:
        samples = [Sample(str(i), (), f"seed {seed}", "a") for i in range(max(train_samples, test_samples))]
        return Stream(name, (Task("x", samples[:train_samples], samples[:test_samples], "accuracy", 4),))

    drawn = types.ModuleType("cram.streams.builtin")
    own = types.SimpleNamespace(train_samples=240, test_samples=25)
    drawn.__dict__.update(STREAMS={name: own}, build=build)
    monkeypatch.setitem(sys.modules, "cram.streams.builtin", drawn)
    stream = load_stream(name, seed=5, limit=limit)
    (task,) = stream.tasks
    assert (len(task.train), len(task.test)) == sizes
    assert stream.name == name and task.train[0].instruction == "seed 5"
