"""Reading of the public file layouts, and one clear error for every fault."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cram.streams.readers import StreamError, add_references, is_folder, read_samples
from cram.streams.types import Sample
from tests.cram.streams.layouts import conversation, dump, picture


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a/1.png", "a/2.png"):
        picture(tmp_path / "images" / name)
    picture(tmp_path / "secret.png")
    return tmp_path


def read(root: Path, rows: Any, repeated_ids: bool = False) -> list[Sample]:
    dump(root / "data.json", rows)
    return read_samples(root / "data.json", root / "images", repeated_ids)


def question(**changes: Any) -> dict[str, Any]:
    row = {"question_id": 7, "image": "a/1.png", "text": "What is it?", "answer": "a cat"}
    return {key: value for key, value in (row | changes).items() if value != "absent"}


def test_what_cannot_be_a_path_is_no_folder(root: Path) -> None:
    assert is_folder(root) and not is_folder(root / "secret.png") and not is_folder(root / ("x" * 5000))


def test_llava_rows(root: Path) -> None:
    one, two, none = read(
        root,
        [
            conversation("x", "a/1.png", "<image>\nWhat is it?\nAnswer briefly.", " a cat "),
            conversation("y", ["a/1.png", "a/2.png"], "<image>\n<image>\nCompare well", "same"),
            conversation("z", None, "1 + 1?", "2"),
        ],
    )
    assert one == Sample(
        "x", (root / "images/a/1.png",), "What is it?\nAnswer briefly.", "a cat",
        source=f"{root / 'data.json'}, row 0",
    )  # fmt: skip
    assert two.images == (root / "images/a/1.png", root / "images/a/2.png")
    assert two.instruction == "Compare well"
    assert none.images == () and none.instruction == "1 + 1?"


def test_question_rows(root: Path) -> None:
    several, plain, number, two = read(
        root,
        [
            question(answer=["a cat", "cat"]),
            question(question_id="q", image=None, text="<image-free> question"),
            question(question_id=8, image="absent", answer=3, type="other keys are ignored"),
            question(question_id=9, image=["a/1.png", "a/2.png"], text="Same?"),
        ],
    )
    assert (several.id, several.answer, several.accepted) == ("7", "a cat", ("a cat", "cat"))
    assert plain.images == () and plain.accepted == ("a cat",)
    assert number.answer == "3"
    assert len(two.images) == 2


def test_pictures_may_stand_under_images(root: Path) -> None:
    rows = [
        {"id": "1", "conversations": [HUMAN, GPT], "images": ["a/1.png", "a/2.png"]},
        {"id": "2", "conversations": [HUMAN, GPT], "images": []},
    ]
    assert [len(sample.images) for sample in read(root, rows)] == [2, 0]
    with pytest.raises(StreamError, match=r"row 0, field 'images': must be an existing file, got 'gone.png'"):
        read(root, [{**rows[0], "images": ["gone.png"]}])


def test_repeated_ids_are_told_apart_where_they_are_allowed(root: Path) -> None:
    rows = [conversation("x", "a/1.png", "q", f"caption {i}") for i in range(3)]
    assert [s.id for s in read(root, rows, repeated_ids=True)] == ["x", "x#1", "x#2"]


def talk(*turns: Any) -> dict[str, Any]:
    return {"id": "x", "conversations": list(turns)}


HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}


@pytest.mark.parametrize(
    ("rows", "place", "fault"),
    [
        (
            [question(), question()],
            "row 1, field 'question_id'",
            "must be unique, got '7' again (first in row 0)",
        ),
        ([question(image="a/9.png")], "row 0, field 'image'", "must be an existing file, got 'a/9.png'"),
        ([question(image="a")], "row 0, field 'image'", "must be an existing file"),
        ([question(image="../secret.png")], "row 0, field 'image'", "must stay under the image root"),
        ([question(image="a/../../secret.png")], "row 0, field 'image'", "must stay under the image root"),
        ([question(image="/etc/hostname")], "row 0, field 'image'", "must stay under the image root"),
        ([question(image="a\0b")], "row 0, field 'image'", "must be a path"),
        ([question(image="")], "row 0, field 'image'", "must be a path, a list of paths or absent, got ''"),
        ([question(image=[])], "row 0, field 'image'", "must be a path, a list of paths or absent, got []"),
        ([question(image=3)], "row 0, field 'image'", "must be a path, a list of paths or absent, got 3"),
        ([question(text="<image><image>x")], "row 0, field 'image'", "got 1 images for 2 placeholders"),
        ([question(image=None, text="<image> x")], "row 0, field 'image'", "got 0 images for 1 placeholders"),
        ([question(text="<image>\n")], "row 0, field 'text'", "must say something beside image placeholders"),
        (
            [question(text="see <image> here")],
            "row 0, field 'text'",
            "only before or after a text, got it inside",
        ),
        ([question(answer=["one", "an <image>"])], "row 0, field 'answer'", "must have no <image>"),
        (
            [conversation("x", "a/1.png", "q", "an <image>")],
            "row 0, field 'conversations[1].value'",
            "must have no <image>",
        ),
        ([question(answer="absent")], "row 0, field 'answer'", "must be a non-empty answer"),
        ([question(answer=" ")], "row 0, field 'answer'", "must be a non-empty answer"),
        ([question(answer=[])], "row 0, field 'answer'", "must be a non-empty answer"),
        ([question(answer=["x", None])], "row 0, field 'answer'", "must be a non-empty answer"),
        ([question(answer=True)], "row 0, field 'answer'", "must be a non-empty answer"),
        ([question(text=None)], "row 0, field 'text'", "must be a non-empty string, got None"),
        (
            [question(question_id="absent")],
            "row 0, field 'question_id'",
            "must be a non-empty string or an integer",
        ),
        (
            [question(question_id=1.5)],
            "row 0, field 'question_id'",
            "must be a non-empty string or an integer",
        ),
        ([question(), "row"], "row 1, field '(row)'", "must be an object, got 'row'"),
        (
            [talk(HUMAN)],
            "row 0, field 'conversations'",
            "one 'human' and one 'gpt' turn, got turns from ['human']",
        ),
        (
            [talk(HUMAN, GPT, HUMAN, GPT)],
            "row 0, field 'conversations'",
            "must be one 'human' and one 'gpt' turn",
        ),
        ([talk("q", "a")], "row 0, field 'conversations'", "must be a list of objects"),
        (
            [talk(HUMAN, {"from": "gpt"})],
            "row 0, field 'conversations[1].value'",
            "must be a non-empty string",
        ),
        ([talk(HUMAN, GPT), talk(HUMAN, GPT)], "row 1, field 'id'", "must be unique, got 'x' again"),
        ([], "field '(file)'", "must be a non-empty list of rows, got []"),
        ({"rows": []}, "field '(file)'", "must be a non-empty list of rows, got {'rows': []}"),
    ],
)
def test_faults_are_named(root: Path, rows: Any, place: str, fault: str) -> None:
    with pytest.raises(StreamError) as caught:
        read(root, rows)
    message = str(caught.value)
    assert message.startswith(f"{root / 'data.json'}, {place}: "), message
    assert fault in message


def test_long_values_are_cut_short_in_messages(root: Path) -> None:
    with pytest.raises(StreamError) as caught:
        read(root, [question(answer=["x" * 5000, None])])
    assert len(str(caught.value)) < len(str(root)) + 300


def test_links_out_of_the_image_root_are_refused(root: Path) -> None:
    (root / "images/file.png").symlink_to(root / "secret.png")
    (root / "images/folder").symlink_to(root)
    (root / "images/inside.png").symlink_to(root / "images/a/1.png")
    for name in ("file.png", "folder/secret.png"):
        with pytest.raises(StreamError, match="must stay under the image root"):
            read(root, [question(image=name)])
    assert read(root, [question(image="inside.png")])[0].images == (root / "images/inside.png",)


def test_the_image_root_itself_may_be_a_link(root: Path) -> None:
    (root / "elsewhere").symlink_to(root / "images")
    dump(root / "data.json", [question()])
    assert read_samples(root / "data.json", root / "elsewhere")[0].images


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"[{", "must be JSON"), (b"\xff\xfe\x00", "must be JSON"), (b"[" * 100_000, "must be JSON")],
)
def test_files_that_are_not_json_are_refused(root: Path, content: bytes, message: str) -> None:
    (root / "data.json").write_bytes(content)
    with pytest.raises(StreamError, match=message):
        read_samples(root / "data.json", root / "images")


def test_absent_file_is_refused(root: Path) -> None:
    with pytest.raises(StreamError, match=r"absent.json, field '\(file\)': must be a readable file"):
        read_samples(root / "absent.json", root / "images")


def coco(root: Path, **changes: Any) -> Path:
    content = {
        "images": [{"id": 20, "file_name": "val/2.png"}, {"id": 10, "file_name": "1.png"}, {"id": "q9"}],
        "annotations": [
            {"image_id": 10, "caption": "first"},
            {"image_id": 20, "caption": "second"},
            {"image_id": 10, "caption": "third"},
            {"image_id": "q9", "caption": "ninth"},
        ],
    }
    dump(root / "coco.json", content | changes)
    return root / "coco.json"


def test_references_are_paired_by_file_name_or_id_never_by_position(root: Path) -> None:
    rows = [
        question(),
        question(question_id=8, image="a/2.png"),
        question(question_id="q9", image=None),
    ]
    samples = add_references(read(root, rows), coco(root))
    assert [s.accepted for s in samples] == [("first", "third"), ("second",), ("ninth",)]
    assert [s.answer for s in samples] == ["a cat"] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotations": []}, "must have captions for .*row 0, got none for any of"),
        ({"images": [{"file_name": "1.png"}]}, "row 0, field 'id': must be"),
        ({"images": [3]}, "row 0, field '(row)': must be an object"),
        ({"annotations": [{"image_id": 10}]}, "row 0, field 'caption': must be"),
        ({"annotations": [{"caption": "x"}]}, "row 0, field 'image_id': must be"),
    ],
)
def test_faulty_references_are_named(root: Path, changes: dict[str, Any], message: str) -> None:
    samples = read(root, [question()])
    with pytest.raises(StreamError, match="coco.json") as caught:
        add_references(samples, coco(root, **changes))
    assert re.search(message.replace("(row)", r"\(row\)"), str(caught.value))


def test_references_must_be_coco(root: Path) -> None:
    samples = read(root, [question()])
    (root / "coco.json").write_text(json.dumps(["x"]))
    with pytest.raises(StreamError, match="field 'images, annotations': must both be present"):
        add_references(samples, root / "coco.json")
