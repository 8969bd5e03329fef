"""Rows as the training tools of the field write them, from JSON, JSON lines, or a data set.

    {"messages": [{"role": "user", "content": "<image>How many?"}, {"role": "assistant", "content": "two"}],
     "images": ["1.png"]}                                    content may be a list of text and image parts
    {"prompt": "How many?", "completion": "two", "image": "1.png"}       each may be a list of messages
    {"conversations": [{"from": "human", "value": "."}, {"from": "gpt", "value": "."}], "image": ["1.png"]}
    {"text": "How many?", "answer": "two", "image": "1.png"}             answer may be a list of accepted ones

A row is one question and one answer. Pictures are paths under the image root, opened images, or objects with
`bytes` or `path`. Whatever a sample cannot keep is refused: a system message, further turns, a picture in an
answer, a placeholder inside of a text, a number of placeholders that is not the number of pictures.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cram.streams.readers import (
    IMAGE_PLACEHOLDER,
    Row,
    StreamError,
    brief,
    find_image,
    is_text,
    listed_pictures,
    load_rows,
    without_placeholders,
)
from cram.streams.types import Sample, Stream, Task

if TYPE_CHECKING:
    from PIL import Image

ROLES = {"human": "user", "gpt": "assistant"}
Said = tuple[str, str, list[Any]]  # role, text, pictures that stand in the content itself
Split = Iterable[Mapping[str, Any]]


def stream_from_datasets(
    name: str,
    tasks: Mapping[str, tuple[Split, Split] | Mapping[str, Split]],
    *,
    scorer: str = "accuracy",
    max_new_tokens: int = 64,
    image_root: str | Path | None = None,
) -> Stream:
    """A stream from rows in memory, such as data sets of Hugging Face; also `Stream.from_datasets`.

    Args:
        name: Name of the stream.
        tasks: Task -> (training rows, test rows), or a mapping with "train" and "test", in the order in which
            they are learnt.
        scorer: A name in `cram.scoring.scorers.SCORERS`, for all tasks.
        max_new_tokens: Length limit of an answer.
        image_root: Folder that pictures given by path must lie in.

    Raises:
        StreamError: For the first fault; the place is "task/train" or "task/test" with the row.
    """
    root = None if image_root is None else Path(image_root)
    made = []
    for task, given in tasks.items():
        train, test = _two_splits(task, given)
        made.append(
            Task(
                task,
                samples_of(train, Path(task, "train"), root),
                samples_of(test, Path(task, "test"), root),
                scorer,
                max_new_tokens,
            )
        )
    return Stream(name, tuple(made))


def _two_splits(task: str, given: Any) -> tuple[Split, Split]:
    if isinstance(given, Mapping):
        if not {"train", "test"} <= given.keys():
            raise StreamError(Path(task), None, "(splits)", f"must be train and test, got {sorted(given)}")
        return given["train"], given["test"]
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise StreamError(Path(task), None, "(splits)", f"must be (train, test), got {brief(given)}")
    return given[0], given[1]


def read_messages(file: str | Path, image_root: str | Path) -> list[Sample]:
    """The samples of a JSON list or of JSON lines.

    Raises:
        StreamError: For the first fault found; rows count from 0.
    """
    return samples_of(load_rows(Path(file)), Path(file), Path(image_root))


def samples_of(rows: Split, place: Path, image_root: Path | None, repeated_ids: bool = False) -> list[Sample]:
    """The samples of rows, checked one by one; ids are those of the rows, else their numbers.

    Args:
        rows: The rows. Those of a data set keep their pictures compressed in memory.
        place: Where the rows come from, for error messages.
        image_root: Folder that pictures given by path must lie in; None refuses paths.
        repeated_ids: As in `cram.streams.readers.read_samples`.

    Raises:
        StreamError: For the first fault, or if there is no row or an id repeats.
    """
    samples: list[Sample] = []
    seen: set[str] = set()
    for number, data in enumerate(_undecoded(rows)):
        row = Row(place, number, dict(data) if isinstance(data, Mapping) else data)
        id_key = next((key for key in ("id", "question_id") if row.data.get(key) is not None), None)
        name = str(number) if id_key is None else row.identifier(id_key)
        if name in seen:
            if not repeated_ids:
                raise row.error("id", f"must be unique, got {name!r} again")
            name = f"{name}#{number}"
        seen.add(name)
        samples.append(_sample(row, name, image_root))
    if not samples:
        raise StreamError(place, None, "(file)", "must hold at least one row, got none")
    return samples


def _undecoded(rows: Split) -> Split:
    """A data set of Hugging Face with its pictures as bytes, so that they are decoded when they are used."""
    features = getattr(rows, "features", None)
    if not isinstance(features, Mapping) or not hasattr(rows, "cast_column"):
        return rows
    from datasets import Image as ImageFeature

    plain = ImageFeature(decode=False)
    found: Any = rows
    for column, feature in features.items():
        if isinstance(feature, ImageFeature):
            found = found.cast_column(column, plain)
        elif isinstance(getattr(feature, "feature", None), ImageFeature):
            found = found.cast_column(column, type(feature)(plain))
    return found


def _sample(row: Row, name: str, root: Path | None) -> Sample:
    turns, answers = _turns(row)
    roles = [role for role, _, _ in turns]
    if roles != ["user", "assistant"]:
        raise row.error("messages", f"must be one 'user' and one 'assistant' message, got {roles}")
    (_, question, shown), (_, answer, drawn) = turns
    if drawn:
        raise row.error("messages", "must have pictures in the question alone, got one in the answer")
    _, several = listed_pictures(row)
    inside = [picture for picture in shown if picture is not None]
    if inside and several:
        raise row.error("images", "must stand in the content or beside it, got both")
    images = tuple(_picture(each, root, row) for each in inside or several)
    text, placeholders = without_placeholders(question)
    wanted = placeholders + len(shown)
    if wanted not in (0, len(images)):
        raise row.error("images", f"must be one per placeholder, got {len(images)} for {wanted} placeholders")
    for field, said in (("question", text), ("answer", answer)):
        if not is_text(said) or not said.strip():
            raise row.error(field, f"must be a non-empty text, got {brief(said)}")
        if IMAGE_PLACEHOLDER in said:
            raise row.error(
                field, f"must have {IMAGE_PLACEHOLDER} only before or after a question, got it inside"
            )
    accepted = answers if len(answers) > 1 else ()
    return Sample(name, images, text, answer.strip(), accepted, f"{row.file}, row {row.index}")


def _turns(row: Row) -> tuple[list[Said], tuple[str, ...]]:
    """The turns of a row and, where it lists them, all accepted answers."""
    data = row.data
    for field in ("messages", "conversations"):
        if field in data:
            return _messages(row, field), ()
    if "answer" in data and "text" in data:
        answers = row.answers("answer")
        return [("user", row.text("text"), []), ("assistant", answers[0], [])], answers
    if "prompt" not in data or "completion" not in data:
        known = "messages, conversations, prompt and completion, or text and answer"
        raise row.error("(row)", f"must have {known}, got the keys {sorted(map(str, data))}")
    found: list[Said] = []
    for field, role in (("prompt", "user"), ("completion", "assistant")):
        said = data[field]
        found += [(role, said, [])] if isinstance(said, str) else _messages(row, field)
    return found, ()


def _messages(row: Row, field: str) -> list[Said]:
    value = row.data[field]
    if not isinstance(value, list | tuple) or not all(isinstance(each, Mapping) for each in value):
        raise row.error(field, f"must be a list of messages, got {brief(value)}")
    found = []
    for index, each in enumerate(value):
        role = each.get("role", each.get("from"))
        text, pictures = _content(row, each.get("content", each.get("value")), f"{field}[{index}]")
        found.append((ROLES.get(str(role), str(role)), text, pictures))
    return found


def _content(row: Row, content: object, where: str) -> tuple[str, list[Any]]:
    """Text and pictures of one message; a part without its own picture counts as a placeholder, None."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, Sequence) or not all(isinstance(part, Mapping) for part in content):
        raise row.error(where, f"must have text or a list of parts as content, got {brief(content)}")
    texts, pictures = [], []
    for part in content:
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif part.get("type") == "image":
            pictures.append(next((part[key] for key in ("image", "path", "url") if part.get(key)), None))
        else:
            raise row.error(where, f"must have parts of type text or image, got {brief(part)}")
    if len(texts) > 1:
        raise row.error(where, f"must have one part of text, got {len(texts)}")
    return "".join(texts), pictures


def _picture(value: Any, root: Path | None, row: Row) -> Image.Image | Path:
    """One picture of a row; encoded bytes are opened, a path is only looked up."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(value, Image.Image):
        return value
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        try:
            return Image.open(io.BytesIO(value["bytes"]))
        except UnidentifiedImageError as error:
            raise row.error("images", f"must be pictures, got bytes of another kind: {error}") from error
    name = value.get("path") if isinstance(value, Mapping) else value
    if not isinstance(name, str | Path) or not str(name):
        raise row.error("images", f"must be pictures or paths, got {brief(value)}")
    if root is None:
        raise row.error("images", f"must lie under an image root for {str(name)!r}, got no root")
    return find_image(row, root, str(name), "images")
