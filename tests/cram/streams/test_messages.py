"""Rows as the field's training tools write them: the same samples, every fault with file, row and field."""

from __future__ import annotations

import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cram.streams import messages
from cram.streams.messages import read_messages, samples_of, stream_from_datasets
from cram.streams.readers import StreamError

ASK, SAY = "How many?\nOne word.", "two"


def said(question: Any, answer: Any = SAY) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


TEXT, PICTURE = {"type": "text", "text": ASK}, {"type": "image"}
EQUAL: dict[str, dict[str, Any]] = {
    "placeholder": {"messages": said(f"<image>\n{ASK}"), "images": ["1.png"]},
    "no placeholder": {"messages": said(ASK), "images": ["1.png"]},
    "placeholder behind": {"messages": said(f"{ASK}<image>"), "images": ["1.png"]},
    "parts": {"messages": said([PICTURE, TEXT], [{"type": "text", "text": SAY}]), "images": ["1.png"]},
    "picture in a part": {"messages": said([{"type": "image", "path": "1.png"}, TEXT])},
    "one image": {"messages": said(ASK), "image": "1.png"},
    "prompt and completion": {"prompt": ASK, "completion": SAY, "image": "1.png"},
    "lists of messages": {"prompt": said(ASK)[:1], "completion": said(ASK)[1:], "images": ["1.png"]},
    "LLaVA, a list": {
        "conversations": [{"from": "human", "value": f"<image>\n{ASK}"}, {"from": "gpt", "value": SAY}],
        "image": ["1.png"],
    },
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("1.png", "2.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("form", EQUAL)
def test_every_form_gives_the_same_sample(form: str, root: Path) -> None:
    (sample,) = samples_of([EQUAL[form]], Path("memory"), root)
    assert (sample.instruction, sample.answer, sample.images) == (ASK, SAY, (root / "1.png",))


@pytest.mark.parametrize(
    ("answers", "accepted"), [([SAY], ()), ([SAY, "two"], (SAY, "two")), ([SAY] * 3, (SAY,) * 3)]
)
def test_several_answers_are_all_accepted(answers: list[str], accepted: tuple[str, ...], root: Path) -> None:
    row = {"question_id": 1, "image": "1.png", "text": ASK, "answer": answers}
    (sample,) = samples_of([row], Path("memory"), root)
    assert (sample.answer, sample.references) == (SAY, accepted)


def test_json_and_json_lines_are_read_alike(root: Path) -> None:
    odd = {"messages": said("one\u2028two\x85three"), "id": "odd"}
    rows = [*EQUAL.values(), odd]
    (root / "a.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (root / "a.jsonl").write_text(lines + "\n", encoding="utf-8")
    one, other = read_messages(root / "a.json", root), read_messages(root / "a.jsonl", root)
    assert [(s.id, s.images, s.instruction, s.answer) for s in one] == [
        (s.id, s.images, s.instruction, s.answer) for s in other
    ]
    assert one[-1].id == "odd" and one[-1].instruction == "one\u2028two\x85three"


def test_a_stream_from_rows_in_memory() -> None:
    picture = Image.new("RGB", (4, 4), "red")
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    train = [{"messages": said(ASK), "images": [picture, {"bytes": encoded.getvalue(), "path": None}]}]
    test = [{"prompt": ASK, "completion": SAY}]
    stream = stream_from_datasets("mine", {"count": (train, test)}, scorer="accuracy", max_new_tokens=5)
    (task,) = stream.tasks
    assert (stream.name, task.name, task.scorer, task.max_new_tokens) == ("mine", "count", "accuracy", 5)
    opened = [image.convert("RGB").getpixel((0, 0)) for image in task.train[0].images]  # type: ignore[union-attr]
    assert opened == [(255, 0, 0)] * 2 and task.test[0].images == ()


def test_a_fault_of_rows_in_memory_names_task_and_split() -> None:
    good, bad = [{"messages": said(ASK)}], [{"messages": said(ASK, " ")}]
    for splits, place in (((bad, good), "count/train"), ((good, bad), "count/test")):
        with pytest.raises(StreamError) as caught:
            stream_from_datasets("mine", {"count": splits})
        assert str(caught.value).startswith(f"{place}, row 0, field 'answer'")


class Pictures:
    """What `datasets.Image` is to a column of a data set."""

    def __init__(self, decode: bool = True) -> None:
        self.decode = decode


class Columns(list[dict[str, Any]]):
    """What `datasets.Dataset` is to a reader of rows: rows, features, and columns that can be cast."""

    def __init__(self, rows: list[dict[str, Any]], features: dict[str, Any]) -> None:
        super().__init__(rows)
        self.features = features

    def cast_column(self, name: str, feature: Any) -> Columns:
        return Columns(self, {**self.features, name: feature})


class Several:
    """What `datasets.Sequence` is to a column of lists."""

    def __init__(self, feature: Any) -> None:
        self.feature = feature


def test_pictures_of_a_data_set_are_not_decoded_before_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("datasets")
    module.Image = Pictures  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    rows = Columns([], {"image": Pictures(), "images": Several(Pictures()), "text": object()})
    found: Any = messages._undecoded(rows)
    assert found.features["image"].decode is False and found.features["images"].feature.decode is False
    assert found.features["text"] is rows.features["text"]


FAULTS: dict[str, tuple[Any, str]] = {
    "not an object": ([1], r"must be an object, got \[1\]"),
    "no known keys": ({"text": "x"}, r"must have messages, conversations, prompt and completion, or text"),
    "a system message": (
        {"messages": [{"role": "system", "content": "Be brief."}, *said(ASK)]},
        r"got \['system', 'user', 'assistant'\]",
    ),
    "two turns": ({"messages": said(ASK) * 2}, r"must be one 'user' and one 'assistant' message"),
    "no list": ({"messages": "x"}, "must be a list of messages, got 'x'"),
    "a number": ({"messages": said(3)}, r"field 'messages\[0\]': must have text or a list of parts"),
    "a video": ({"messages": said([{"type": "video"}])}, "must have parts of type text or image"),
    "two texts": ({"messages": said([TEXT, TEXT])}, "must have one part of text, got 2"),
    "a placeholder inside": (
        {"messages": said("See <image> there"), "images": ["1.png"]},
        "must have <image> only before or after a question",
    ),
    "a placeholder in the answer": (
        {"messages": said(ASK, "an <image>")},
        "field 'answer': must have <image>",
    ),
    "a picture in the answer": ({"messages": said(ASK, [PICTURE])}, "got one in the answer"),
    "too many placeholders": (
        {"messages": said(f"<image><image>{ASK}"), "images": ["1.png"]},
        "got 1 for 2 placeholders",
    ),
    "no picture": ({"messages": said(f"<image>{ASK}")}, "got 0 for 1 placeholders"),
    "nothing asked": (
        {"messages": said("<image>"), "image": "1.png"},
        "field 'question': must be a non-empty",
    ),
    "no answer": ({"messages": said(ASK, " ")}, "field 'answer': must be a non-empty text"),
    "a lost picture": (
        {"messages": said(ASK), "image": "gone.png"},
        "must be an existing file, got 'gone.png'",
    ),
    "outside": ({"messages": said(ASK), "image": "../x.png"}, "must stay under the image root"),
    "no picture at all": ({"messages": said(ASK), "image": 7}, "must be pictures or paths, got 7"),
    "other bytes": ({"messages": said(ASK), "image": {"bytes": b"x"}}, "got bytes of another kind"),
    "both": (
        {"messages": said([{"type": "image", "path": "1.png"}, TEXT]), "images": ["1.png"]},
        "must stand in the content or beside it, got both",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_names_place_row_and_field(fault: str, root: Path) -> None:
    row, words = FAULTS[fault]
    good = {"messages": said(ASK)}
    with pytest.raises(StreamError, match=words) as caught:
        samples_of([good, row], Path("task/train"), root)
    assert str(caught.value).startswith("task/train, row 1, field '")


def test_faults_of_whole_files(root: Path) -> None:
    good = {"messages": said(ASK), "id": "a"}
    with pytest.raises(StreamError, match="must be unique, got 'a' again"):
        samples_of([good, good], Path("x"), root)
    with pytest.raises(StreamError, match="must hold at least one row"):
        samples_of([], Path("x"), root)
    with pytest.raises(StreamError, match="got no root"):
        samples_of([{"messages": said(ASK), "image": "1.png"}], Path("x"), None)
    (root / "x.jsonl").write_text('{"messages": []}\n{')
    with pytest.raises(StreamError, match=r"row 1, field .*must be JSON"):
        read_messages(root / "x.jsonl", root)
    with pytest.raises(StreamError, match="must be a readable file"):
        read_messages(root / "gone.jsonl", root)
