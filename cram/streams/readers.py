"""Readers of the public file layouts: LLaVA training JSON, question/answer test JSON, COCO captions.

Every row is checked while the file is read. So a file that was read can be used. For an image, the check is
that its file exists and lies under the image root. An image is opened when its sample is used.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from cram.streams.types import Sample

IMAGE_PLACEHOLDER = "<image>"


class StreamError(ValueError):
    """A fault in the data of a stream. The message names the file, the row and the field."""

    def __init__(self, file: Path, row: int | None, field: str, fault: str) -> None:
        place = str(file) if row is None else f"{file}, row {row}"
        super().__init__(f"{place}, field '{field}': {fault}")


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
        raise StreamError(file, None, "images, annotations", f"must both be present, got {_brief(data)}")
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
            raise StreamError(file, index, "(row)", f"must be an object, got {_brief(data)}")
        self.data: dict[str, Any] = data

    @property
    def id_key(self) -> str:
        return "id" if "conversations" in self.data else "question_id"

    def error(self, field: str, fault: str) -> StreamError:
        return StreamError(self.file, self.index, field, fault)

    def text(self, field: str) -> str:
        value = self.data.get(field)
        if not isinstance(value, str) or not value.strip():
            raise self.error(field, f"must be a non-empty string, got {_brief(value)}")
        return value

    def identifier(self, field: str) -> str:
        value = self.data.get(field)
        if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
            raise self.error(field, f"must be a non-empty string or an integer, got {_brief(value)}")
        return str(value)

    def answers(self, field: str) -> tuple[str, ...]:
        value = self.data.get(field)
        values = value if isinstance(value, list) else [value]
        texts = tuple(str(item).strip() for item in values if _is_answer(item))
        if not texts or len(texts) != len(values):
            raise self.error(field, f"must be a non-empty answer or a list of them, got {_brief(value)}")
        return texts


def _is_answer(value: object) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _read_text(row: _Row) -> tuple[str, str, tuple[str, ...]]:
    reader: Callable[[_Row], tuple[str, tuple[str, ...]]]
    reader = _read_conversation if "conversations" in row.data else _read_question
    instruction, answers = reader(row)
    return row.identifier(row.id_key), instruction, answers


def _read_conversation(row: _Row) -> tuple[str, tuple[str, ...]]:
    turns = row.data["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise row.error("conversations", f"must be a list of objects, got {_brief(turns)}")
    speakers = [turn.get("from") for turn in turns]
    if speakers != ["human", "gpt"]:
        raise row.error("conversations", f"must be one 'human' and one 'gpt' turn, got turns from {speakers}")
    texts = []
    for index, turn in enumerate(turns):
        value = turn.get("value")
        if not isinstance(value, str) or not value.strip():
            raise row.error(
                f"conversations[{index}].value", f"must be a non-empty string, got {_brief(value)}"
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
        raise row.error("image", f"must be a path, a list of paths or absent, got {_brief(value)}")
    return tuple(_find_image(row, image_root, name) for name in names)


def _find_image(row: _Row, image_root: Path, name: str) -> Path:
    if "\0" in name:
        raise row.error("image", f"must be a path, got {name!r}")
    path = image_root / name
    real = path.resolve() if path.is_symlink() else _real_folder(path.parent) / path.name
    if not real.is_relative_to(_real_folder(image_root)):
        raise row.error("image", f"must stay under the image root {image_root}, got {name!r}")
    if not real.is_file():
        raise row.error("image", f"must be an existing file, got {name!r} (looked for {path})")
    return path


@lru_cache(maxsize=65536)
def _real_folder(folder: Path) -> Path:
    return folder.resolve()


def _load_rows(file: Path) -> list[Any]:
    rows = _load_json(file)
    if not isinstance(rows, list) or not rows:
        raise StreamError(file, None, "(file)", f"must be a non-empty list of rows, got {_brief(rows)}")
    return rows


def _load_json(file: Path) -> Any:
    try:
        with file.open(encoding="utf-8") as opened:
            return json.load(opened)
    except OSError as error:
        raise StreamError(file, None, "(file)", f"must be a readable file, got {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise StreamError(file, None, "(file)", f"must be JSON, got {error}") from error


def _brief(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
