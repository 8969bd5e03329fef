"""Readers of the public file layouts: LLaVA training JSON, question/answer test JSON, COCO captions.

Every row is checked while the file is read. So a file that was read can be used. For an image, the check is
that its file exists and lies under the image root. An image is opened when its sample is used.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from reprlib import Repr
from typing import Any, TypeGuard

from cram.streams.types import Sample

IMAGE_PLACEHOLDER = "<image>"
# Larger than this is a damaged file; more data come in more tasks.
MAX_JSON_BYTES = 4 << 30

# What a path can raise: a loop of links, a null byte, half a character, a name that is too long.
PATH_ERRORS = (OSError, RuntimeError, ValueError)
_SHORT = Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 2, 100, 100, 100


class StreamError(ValueError):
    """A fault in the data of a stream. The message names the file, the row and the field."""

    def __init__(self, file: Path, row: int | None, field: str, fault: str) -> None:
        place = str(file) if row is None else f"{file}, row {row}"
        # A file's name may hold line breaks.
        super().__init__(" ".join(f"{place}, field '{field}': {fault}".splitlines()))


def read_samples(file: Path, image_root: Path, repeated_ids: bool = False) -> list[Sample]:
    """Read one split.

    A row with `conversations` is read as LLaVA JSON: `{id, image?, conversations: [{from, value}]}`. Any
    other row is read as test JSON: `{question_id, image?, text, answer}`. `answer` is a string, a number or a
    list of accepted answers. `image` is a path, a list of paths, null or absent. Paths are relative to
    `image_root`. Image placeholders are removed from the instruction. Other keys of a row are ignored.

    Args:
        file: JSON file that holds a list of rows.
        image_root: Folder that every image must lie in.
        repeated_ids: True if ids may repeat, as in training files with several captions per image. Then the
            row number is added to a repeated id.

    Raises:
        StreamError: For the first fault. Rows count from 0.
    """
    rows = _load_rows(file)
    seen: dict[str, int] = {}
    samples = []
    for index, data in enumerate(rows):
        row = _Row(file, index, data)
        sample_id, instruction, answers = _read_text(row)
        if sample_id in seen:
            if not repeated_ids:
                raise row.error(
                    row.id_key,
                    f"must be unique, got {sample_id!r} again (first in row {seen[sample_id]}); training "
                    "data whose ids repeat needs 'repeated_ids: true' in the stream file",
                )
            sample_id = f"{sample_id}#{index}"
        seen[sample_id] = index
        images = _find_images(row, image_root)
        text = _strip_placeholders(row, instruction, len(images))
        source = f"{file}, row {index}"
        samples.append(
            Sample(sample_id, images, text, answers[0], answers if len(answers) > 1 else (), source)
        )
    return samples


def add_references(samples: Sequence[Sample], file: Path) -> list[Sample]:
    """Give captioning samples their reference captions from a COCO file.

    The file is `{images: [{id, file_name?}], annotations: [{image_id, caption}]}`. A sample belongs to the
    image with the same file name; folder and extension do not matter. If there is none, the sample belongs to
    the image whose id is the sample's question id. The position in the file decides nothing.

    Raises:
        StreamError: If the file is malformed or has no caption for a sample.
    """
    data = _load_json(file)
    if not isinstance(data, dict) or not {"images", "annotations"} <= data.keys():
        raise StreamError(file, None, "images, annotations", f"must both be present, got {brief(data)}")
    for field in ("images", "annotations"):
        if not isinstance(data[field], list):
            raise StreamError(file, None, field, f"must be a list, got {brief(data[field])}")
    captions: dict[str, list[str]] = defaultdict(list)
    for index, annotation in enumerate(data["annotations"]):
        row = _Row(file, index, annotation)
        captions[row.identifier("image_id")].append(row.text("caption"))
    image_ids: dict[str, str] = {}
    for index, image in enumerate(data["images"]):
        row = _Row(file, index, image)
        image_id = row.identifier("id")
        image_ids[image_id] = image_id
        if "file_name" in row.data:
            image_ids[Path(row.text("file_name")).stem] = image_id
    return [_with_references(sample, image_ids, captions, file) for sample in samples]


def _with_references(
    sample: Sample, image_ids: dict[str, str], captions: dict[str, list[str]], file: Path
) -> Sample:
    names = [Path(image).stem for image in sample.images if isinstance(image, Path)] + [sample.id]
    for name in names:
        found = captions.get(image_ids.get(name, ""))
        if found:
            return Sample(
                sample.id, sample.images, sample.instruction, sample.answer, tuple(found), sample.source
            )
    raise StreamError(
        file, None, "images", f"must have captions for {sample.source}, got none for any of {names}"
    )


class _Row:
    """One row of a file. The accessors name the place of a fault."""

    def __init__(self, file: Path, index: int, data: object) -> None:
        self.file, self.index = file, index
        if not isinstance(data, dict):
            raise StreamError(file, index, "(row)", f"must be an object, got {brief(data)}")
        self.data: dict[str, Any] = data

    @property
    def id_key(self) -> str:
        return "id" if "conversations" in self.data else "question_id"

    def error(self, field: str, fault: str) -> StreamError:
        return StreamError(self.file, self.index, field, fault)

    def text(self, field: str) -> str:
        value = self.data.get(field)
        if not _is_text(value) or not value.strip():
            raise self.error(field, f"must be a non-empty string, got {brief(value)}")
        return value

    def identifier(self, field: str) -> str:
        value = self.data.get(field)
        if (type(value) is not int and not _is_text(value)) or value == "":
            raise self.error(field, f"must be a non-empty string or an integer, got {brief(value)}")
        return str(value)

    def answers(self, field: str) -> tuple[str, ...]:
        value = self.data.get(field)
        values = value if isinstance(value, list) else [value]
        texts = tuple(str(item).strip() for item in values if _is_answer(item))
        if not texts or len(texts) != len(values):
            raise self.error(field, f"must be a non-empty answer or a list of them, got {brief(value)}")
        return texts


def _is_answer(value: object) -> bool:
    if isinstance(value, str):
        return _is_text(value) and bool(value.strip())
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def _is_text(value: object) -> TypeGuard[str]:
    """Whether it is a string that UTF-8 can hold; JSON's escapes can name half a character."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_text(row: _Row) -> tuple[str, str, tuple[str, ...]]:
    reader: Callable[[_Row], tuple[str, tuple[str, ...]]]
    reader = _read_conversation if "conversations" in row.data else _read_question
    instruction, answers = reader(row)
    return row.identifier(row.id_key), instruction, answers


def _read_conversation(row: _Row) -> tuple[str, tuple[str, ...]]:
    turns = row.data["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise row.error("conversations", f"must be a list of objects, got {brief(turns)}")
    speakers = [turn.get("from") for turn in turns]
    if speakers != ["human", "gpt"]:
        raise row.error("conversations", f"must be one 'human' and one 'gpt' turn, got turns from {speakers}")
    texts = []
    for index, turn in enumerate(turns):
        value = turn.get("value")
        if not _is_text(value) or not value.strip():
            raise row.error(
                f"conversations[{index}].value", f"must be a non-empty string, got {brief(value)}"
            )
        texts.append(value)
    return texts[0], (texts[1].strip(),)


def _read_question(row: _Row) -> tuple[str, tuple[str, ...]]:
    return row.text("text"), row.answers("answer")


def _strip_placeholders(row: _Row, instruction: str, num_images: int) -> str:
    """Remove the image placeholders. If there are any, there must be one per image."""
    placeholders = instruction.count(IMAGE_PLACEHOLDER)
    if placeholders not in (0, num_images):
        raise row.error(
            "image",
            f"must have one image per placeholder, got {num_images} images for {placeholders} placeholders",
        )
    text = re.sub(rf"\n?{IMAGE_PLACEHOLDER}\n?", "", instruction).strip()
    if not text:
        raise row.error("text", "must say something beside image placeholders, got nothing else")
    return text


def _find_images(row: _Row, image_root: Path) -> tuple[Path, ...]:
    value = row.data.get("image")
    if value is None:
        return ()
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise row.error("image", f"must be a path, a list of paths or absent, got {brief(value)}")
    return tuple(_find_image(row, image_root, name) for name in names)


def _find_image(row: _Row, image_root: Path, name: str) -> Path:
    if "\0" in name or not _is_text(name):  # `is_file` would call such a file absent.
        raise row.error("image", f"must be a path, got {brief(name)}")
    path = image_root / name
    try:
        real = path.resolve() if path.is_symlink() else _real_folder(path.parent) / path.name
        inside, exists = real.is_relative_to(_real_folder(image_root)), real.is_file()
    except PATH_ERRORS as error:
        raise row.error("image", f"must be a path, got {brief(name)}: {one_line(error)}") from error
    if not inside:
        raise row.error("image", f"must stay under the image root {image_root}, got {brief(name)}")
    if not exists:
        raise row.error("image", f"must be an existing file, got {name!r:.300} (looked for {path!s:.300})")
    return path


@lru_cache(maxsize=65536)
def _real_folder(folder: Path) -> Path:
    return folder.resolve()


def _load_rows(file: Path) -> list[Any]:
    rows = _load_json(file)
    if not isinstance(rows, list) or not rows:
        raise StreamError(file, None, "(file)", f"must be a non-empty list of rows, got {brief(rows)}")
    return rows


def _load_json(file: Path) -> Any:
    try:
        # Opening a pipe would wait for its writer.
        if file.exists() and not file.is_file():
            raise StreamError(file, None, "(file)", "must be a readable file, got something that is no file")
        if (size := file.stat().st_size) > MAX_JSON_BYTES:
            raise StreamError(file, None, "(file)", f"must have at most {MAX_JSON_BYTES} bytes, got {size}")
        with file.open(encoding="utf-8") as opened:
            return json.load(opened, parse_constant=_refuse_constant)
    except OSError as error:
        raise StreamError(file, None, "(file)", f"must be a readable file, got {error.strerror}") from error
    except StreamError:
        raise
    except (ValueError, RecursionError) as error:
        raise StreamError(file, None, "(file)", f"must be JSON, got {one_line(error)}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"the constant {name}")


def brief(value: object, limit: int = 80) -> str:
    """A value in one short line, whatever its size; YAML aliases can stand for a list too long to print."""
    try:
        text = _SHORT.repr(value)
    except ValueError:  # An integer of more digits than Python prints.
        text = f"a very large {type(value).__name__}"
    return text if len(text) <= limit else f"{text[:limit]}..."


def one_line(error: BaseException) -> str:
    """An error's text in one line."""
    return " ".join(str(error).split())[:300]
