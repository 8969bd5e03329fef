"""A row's pictures are read under both of their names, and a picture under another name is no silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cram.scoring.scorers import read_predictions
from cram.streams.messages import read_messages, samples_of
from cram.streams.readers import StreamError, read_samples
from cram.streams.types import Sample

ASKED = {"question_id": "1", "text": "What?", "answer": "red"}
READERS = (read_samples, read_messages)


def read(reader: Any, folder: Path, row: dict[str, Any], encoding: str = "utf-8") -> Sample:
    """The sample of one row, beside two pictures."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (2, 2)).save(folder / name)
    (folder / "rows.json").write_text(json.dumps([{**ASKED, **row}]), encoding=encoding)
    return reader(folder / "rows.json", folder)[0]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"image": "a.png", "images": []}, ["a.png"]),
        ({"image": None, "images": ["a.png", "b.png"]}, ["a.png", "b.png"]),
        ({"image": "b.png", "images": ["a.png", "b.png"]}, ["a.png", "b.png"]),
        ({"image": "a.png", "image_path": "elsewhere.png"}, ["a.png"]),
        ({"image_id": 7, "img": None, "imagined": "a story", "source": "a.png"}, []),
    ],
)
def test_both_names_are_read(reader: Any, row: dict[str, Any], names: list[str], tmp_path: Path) -> None:
    assert [image.name for image in read(reader, tmp_path, row).images] == names


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"image": "a.png", "images": ["b.png"]}, "field 'images': must hold the pictures of 'image' too"),
        ({"img": "a.png"}, "field 'img': must be named 'image' or 'images' to be read, got 'a.png'"),
        ({"Image": "A.JPG", "image": None}, "field 'Image': must be named"),
        ({"image_paths": ["a.png"]}, "field 'image_paths': must be named"),
        ({"photo": {"path": "a.png"}}, "field 'photo': must be named"),
    ],
)
def test_pictures_that_would_not_be_read_are_refused(
    reader: Any, row: dict[str, Any], fault: str, tmp_path: Path
) -> None:
    with pytest.raises(StreamError, match=fault):
        read(reader, tmp_path, row)


def test_opened_and_encoded_pictures_under_another_name_are_refused() -> None:
    for value in (Image.new("RGB", (2, 2)), {"bytes": b"x", "path": None}):
        with pytest.raises(StreamError, match="field 'picture': must be named"):
            samples_of([{**ASKED, "picture": value}], Path("rows"), None)


@pytest.mark.parametrize("reader", READERS)
def test_a_byte_order_mark_is_no_content(reader: Any, tmp_path: Path) -> None:
    assert read(reader, tmp_path, {}, "utf-8-sig").instruction == "What?"


def test_predictions_of_other_tools_may_hold_any_separator(tmp_path: Path) -> None:
    text = "a\u2028b\x85c\x0cd"
    row = json.dumps({"question_id": "1", "text": text}, ensure_ascii=False)
    (tmp_path / "p.jsonl").write_text(f"{row}\r\n", encoding="utf-8-sig", newline="")
    assert read_predictions(tmp_path / "p.jsonl") == {"1": text}
