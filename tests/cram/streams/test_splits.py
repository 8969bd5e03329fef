"""Splits of a stream file in every form: messages, prompts, JSON lines, data sets on disk."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from cram.streams import Sample, Stream, StreamError, load_stream, open_images
from tests.cram.streams.layouts import conversation, dump, picture

ASK, SAY = "How many?", "two"
FORMS: dict[str, dict[str, Any]] = {
    "messages": {
        "messages": [{"role": "user", "content": f"<image>{ASK}"}, {"role": "assistant", "content": SAY}],
        "images": ["a.png"],
    },
    "prompt": {"prompt": ASK, "completion": SAY, "image": "a.png"},
    "conversations": conversation("0", ["a.png"], f"<image>\n{ASK}", SAY),
    "question": {"question_id": "0", "image": "a.png", "text": ASK, "answer": SAY},
}


def write(folder: Path, split: str, **task: Any) -> Path:
    picture(folder / "a.png")
    dump(folder / "test.json", [FORMS["question"]])
    described = {
        "name": "one",
        "train": split,
        "test": "test.json",
        "scorer": "accuracy",
        "max_new_tokens": 2,
    }
    (folder / "stream.yaml").write_text(yaml.safe_dump({"name": "toy", "tasks": [{**described, **task}]}))
    return folder / "stream.yaml"


def same(sample: Sample, folder: Path) -> bool:
    found = (sample.instruction, sample.answer, sample.images)
    return sample.id == "0" and found == (ASK, SAY, (folder / "a.png",))


@pytest.mark.parametrize("ending", ["json", "jsonl"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_from_a_stream_file(tmp_path: Path, form: str, ending: str) -> None:
    stream = write(tmp_path, f"train.{ending}")
    row = json.dumps(FORMS[form])
    (tmp_path / f"train.{ending}").write_text(f"[{row}]" if ending == "json" else f"\n{row}\n\n")
    (task,) = load_stream(stream).tasks
    assert same(task.train[0], tmp_path) and same(task.test[0], tmp_path)


def test_repeated_ids_of_messages_are_told_apart_where_they_are_allowed(tmp_path: Path) -> None:
    dump(tmp_path / "train.json", [{**FORMS["messages"], "id": "x"}] * 2)
    (task,) = load_stream(write(tmp_path, "train.json", repeated_ids=True)).tasks
    assert [sample.id for sample in task.train] == ["x", "x#1"]
    with pytest.raises(StreamError, match=r"train\.json, row 1, field 'id': must be unique"):
        load_stream(write(tmp_path, "train.json"))


FAULTS = {
    "a row of another form": ([FORMS["messages"], {"question": ASK}], r"row 1, field '\(row\)': must have"),
    "half a character": (
        [{"prompt": "\ud83d", "completion": SAY}],
        "row 0, field 'question': must be a non-empty text",
    ),
    "a number as id": ([{**FORMS["prompt"], "id": 1.5}], "row 0, field 'id': must be a non-empty string"),
    "a path with a null": ([{**FORMS["prompt"], "image": "a\0"}], "row 0, field 'images': must be a path"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_messages_in_a_file_name_row_and_field(tmp_path: Path, name: str) -> None:
    rows, message = FAULTS[name]
    dump(tmp_path / "train.json", rows)
    with pytest.raises(StreamError, match=rf"train\.json, {message}"):
        load_stream(write(tmp_path, "train.json"))


@pytest.mark.parametrize(
    ("line", "message"), [("{", "must be JSON"), ('{"answer": NaN}', "the constant NaN")]
)
def test_a_line_that_is_no_json_is_named(tmp_path: Path, line: str, message: str) -> None:
    stream = write(tmp_path, "train.jsonl")
    (tmp_path / "train.jsonl").write_text(f"{json.dumps(FORMS['question'])}\n\n{line}\n")
    with pytest.raises(StreamError, match=rf"train\.jsonl, row 1, field '\(row\)': .*{message}"):
        load_stream(stream)


@pytest.mark.parametrize("key", ["scorer", "train", "epochs", "images"])
def test_faults_of_a_stream_file_name_the_line(tmp_path: Path, key: str) -> None:
    stream = write(tmp_path, "train.json", **{key: "../x"})
    lines = stream.read_text().splitlines()
    with pytest.raises(
        StreamError, match=r"stream\.yaml, field 'tasks\[0\]\.\w+': .* \(line (\d+)\)"
    ) as fault:
        load_stream(stream)
    named = lines[int(str(fault.value).rsplit("line ", 1)[1].rstrip(")")) - 1]
    assert f"{key}:" in named, (named, lines)


class Rows(list[dict[str, Any]]):
    """What `datasets.load_from_disk` returns, as far as it is used."""


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package datasets, which reads rows from the folder's JSON file."""
    module = types.ModuleType("datasets")

    def load_from_disk(folder: str) -> Rows:
        return Rows(json.loads((Path(folder) / "rows.json").read_text()))

    module.load_from_disk = load_from_disk  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


@pytest.mark.usefixtures("datasets")
def test_a_data_set_on_disk_is_a_split(tmp_path: Path) -> None:
    dump(tmp_path / "set/rows.json", [FORMS["question"]])
    dump(tmp_path / "set/dataset_info.json", {})
    (task,) = load_stream(write(tmp_path, "set")).tasks
    assert same(task.train[0], tmp_path)


def test_other_folders_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set/train").mkdir(parents=True)
    stream = write(tmp_path, "set")
    with pytest.raises(StreamError, match="must be a readable file or a data set of save_to_disk"):
        load_stream(stream)
    dump(tmp_path / "set/dataset_dict.json", {})
    with pytest.raises(StreamError, match=r"must be one split, got \['train'\]; name set/<split>"):
        load_stream(stream)
    (tmp_path / "set/dataset_dict.json").unlink()
    dump(tmp_path / "set/dataset_info.json", {})
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(StreamError, match="must be read by the package datasets, got none; pip install"):
        load_stream(stream)


@pytest.fixture
def real_datasets() -> Any:
    """The package datasets itself; tests that need it skip where it is not installed."""
    return pytest.importorskip("datasets", reason="the package datasets is not installed")


def test_a_real_data_set_keeps_its_pictures_compressed(tmp_path: Path, real_datasets: Any) -> None:
    features = real_datasets.Features(
        {
            "image": real_datasets.Image(),
            "prompt": real_datasets.Value("string"),
            "completion": real_datasets.Value("string"),
        }
    )
    rows = {"image": [Image.new("RGB", (4, 4), "red")], "prompt": [ASK], "completion": [SAY]}
    made = real_datasets.Dataset.from_dict(rows, features=features)
    made.save_to_disk(str(tmp_path / "set"))
    (task,) = load_stream(write(tmp_path, "set")).tasks
    stream = Stream.from_datasets("toy", {"one": {"train": made, "test": made}})
    for sample in (task.train[0], stream.tasks[0].test[0]):
        assert (sample.instruction, sample.answer) == (ASK, SAY)
        assert open_images(sample)[0].getpixel((0, 0)) == (255, 0, 0)


def test_a_stream_in_three_lines() -> None:
    train = [{"image": Image.new("RGB", (4, 4)), "text": ASK, "answer": [SAY, "2"]}]
    pair = Stream.from_datasets("toy", {"count": (train, train)}, scorer="number", max_new_tokens=3)
    both = Stream.from_datasets("toy", {"count": {"train": train, "test": train}}, scorer="number")
    assert pair.tasks[0].test[0].accepted == (SAY, "2") and pair.tasks[0].max_new_tokens == 3
    assert both.tasks[0].train == pair.tasks[0].train


@pytest.mark.parametrize(
    ("given", "message"),
    [({"train": []}, r"must be train and test, got \['train'\]"), ([[]], r"must be \(train, test\), got")],
)
def test_tasks_without_two_splits_are_refused(given: Any, message: str) -> None:
    with pytest.raises(StreamError, match=message):
        Stream.from_datasets("toy", {"count": given})
