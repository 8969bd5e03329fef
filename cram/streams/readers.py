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
UTF8 = "utf-8-sig"  # also with the mark that some editors put in front
PICTURE_FIELDS = ("images", "image")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_LIKE_PICTURES = re.compile("ima?ge?|pict|photo", re.IGNORECASE)
LINES = (".jsonl", ".ndjson")  # names of files that hold a JSON object a line


# What a path can raise: a loop of links, a null byte, half a character, a name that is too long.
PATH_ERRORS = (OSError, RuntimeError, ValueError)
_SHORT = Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 2, 100, 100, 100


class StreamError(ValueError):
    """A fault in the data of a stream. The message names the file, the row and the field.

    Attributes:
        file: The file.
        row: The row, from 0, or None.
        field: The field.
        fault: What must be there and what was found.
    """

    def __init__(self, file: Path, row: int | None, field: str, fault: str) -> None:
        self.file, self.row, self.field, self.fault = file, row, field, fault
        place = str(file) if row is None else f"{file}, row {row}"
        # A file's name may hold line breaks.
        super().__init__(" ".join(f"{place}, field '{field}': {fault}".splitlines()))

    def at_line(self, line: int) -> StreamError:
        """The same fault with the number of its line in the file, from 1."""
        return StreamError(self.file, self.row, self.field, f"{self.fault} (line {line})")


def read_samples(file: Path, image_root: Path, repeated_ids: bool = False) -> list[Sample]:
    """Read one split.

    A row with `conversations` is read as LLaVA JSON: `{id, image?, conversations: [{from, value}]}`. Any
    other row is read as test JSON: `{question_id, image?, text, answer}`. `answer` is a string, a number or a
    list of accepted answers. `image` or `images` is a path, a list of paths, null or absent. Paths lie under
    `image_root`. Image placeholders are removed from the instruction. Other keys of a row are ignored.

    Args:
        file: JSON file that holds a list of rows, or JSON lines.
        image_root: Folder that every image must lie in.
        repeated_ids: True if ids may repeat, as in training files with several captions per image. Then the
            row number is added to a repeated id.

    Raises:
        StreamError: For the first fault. Rows count from 0.
    """
    return samples_of_rows(file, load_rows(file), image_root, repeated_ids)


def samples_of_rows(
    file: Path, rows: Sequence[Any], image_root: Path, repeated_ids: bool = False
) -> list[Sample]:
    """The samples of rows that were read from `file`; see `read_samples`."""
    seen: dict[str, int] = {}
    samples = []
    for index, data in enumerate(rows):
        row = Row(file, index, data)
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
    data = load_json(file)
    if not isinstance(data, dict) or not {"images", "annotations"} <= data.keys():
        raise StreamError(file, None, "images, annotations", f"must both be present, got {brief(data)}")
    for field in ("images", "annotations"):
        if not isinstance(data[field], list):
            raise StreamError(file, None, field, f"must be a list, got {brief(data[field])}")
    captions: dict[str, list[str]] = defaultdict(list)
    for index, annotation in enumerate(data["annotations"]):
        row = Row(file, index, annotation)
        captions[row.identifier("image_id")].append(row.text("caption"))
    image_ids: dict[str, str] = {}
    for index, image in enumerate(data["images"]):
        row = Row(file, index, image)
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


class Row:
    """One row of a file. Its accessors and `error` name the place of a fault."""

    def __init__(self, file: Path, index: int | None, data: object) -> None:
        self.file, self.index = file, index
        if not isinstance(data, dict):
            raise StreamError(file, index, "(row)", f"must be an object, got {brief(data)}")
        self.data: dict[str, Any] = data

    @property
    def id_key(self) -> str:
        """The key of the row's id in its layout."""
        return "id" if "conversations" in self.data else "question_id"

    def error(self, field: str, fault: str) -> StreamError:
        """The error for a field of this row."""
        return StreamError(self.file, self.index, field, fault)

    def text(self, field: str) -> str:
        """The non-empty text of a field."""
        value = self.data.get(field)
        if not is_text(value) or not value.strip():
            raise self.error(field, f"must be a non-empty string, got {brief(value)}")
        return value

    def identifier(self, field: str) -> str:
        """The id in a field, as a text."""
        value = self.data.get(field)
        if (type(value) is not int and not is_text(value)) or value == "":
            raise self.error(field, f"must be a non-empty string or an integer, got {brief(value)}")
        return str(value)

    def answers(self, field: str) -> tuple[str, ...]:
        """All accepted answers in a field, at least one."""
        value = self.data.get(field)
        values = value if isinstance(value, list) else [value]
        texts = tuple(str(item).strip() for item in values if _is_answer(item))
        if not texts or len(texts) != len(values):
            raise self.error(field, f"must be a non-empty answer or a list of them, got {brief(value)}")
        for text in texts:
            self.check_answer(field, text)
        return texts

    def check_answer(self, field: str, text: str) -> None:
        """Refuse an answer that holds an image placeholder."""
        if IMAGE_PLACEHOLDER in text:
            raise self.error(field, f"must have no {IMAGE_PLACEHOLDER}, got it in an answer")


def _is_answer(value: object) -> bool:
    if isinstance(value, str):
        return is_text(value) and bool(value.strip())
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def is_text(value: object) -> TypeGuard[str]:
    """Whether it is a string that UTF-8 can hold; JSON's escapes can name half a character."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_text(row: Row) -> tuple[str, str, tuple[str, ...]]:
    reader: Callable[[Row], tuple[str, tuple[str, ...]]]
    reader = _read_conversation if "conversations" in row.data else _read_question
    instruction, answers = reader(row)
    return row.identifier(row.id_key), instruction, answers


def _read_conversation(row: Row) -> tuple[str, tuple[str, ...]]:
    turns = row.data["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise row.error("conversations", f"must be a list of objects, got {brief(turns)}")
    speakers = [turn.get("from") for turn in turns]
    if speakers != ["human", "gpt"]:
        raise row.error("conversations", f"must be one 'human' and one 'gpt' turn, got turns from {speakers}")
    texts = []
    for index, turn in enumerate(turns):
        value = turn.get("value")
        if not is_text(value) or not value.strip():
            raise row.error(
                f"conversations[{index}].value", f"must be a non-empty string, got {brief(value)}"
            )
        texts.append(value)
    row.check_answer("conversations[1].value", texts[1])
    return texts[0], (texts[1].strip(),)


def _read_question(row: Row) -> tuple[str, tuple[str, ...]]:
    # CoIN's boxes stand under a name of their own.
    boxes = "answer_bbox" in row.data and "answer" not in row.data
    return row.text("text"), row.answers("answer_bbox" if boxes else "answer")


def _strip_placeholders(row: Row, instruction: str, num_images: int) -> str:
    """Remove the image placeholders. If there are any, there must be one per image."""
    text, placeholders = without_placeholders(instruction)
    if placeholders not in (0, num_images):
        raise row.error(
            "image",
            f"must have one image per placeholder, got {num_images} images for {placeholders} placeholders",
        )
    if not text:
        raise row.error("text", "must say something beside image placeholders, got nothing else")
    if IMAGE_PLACEHOLDER in text:
        raise row.error("text", f"must have {IMAGE_PLACEHOLDER} only before or after a text, got it inside")
    return text


def without_placeholders(text: str) -> tuple[str, int]:
    """The text without the image placeholders at its ends, and how many those are."""
    text, count = text.strip(), 0
    for cut in (str.removeprefix, str.removesuffix):
        while (rest := cut(text, IMAGE_PLACEHOLDER)) != text:
            text, count = rest.strip(), count + 1
    return text, count


def _find_images(row: Row, image_root: Path) -> tuple[Path, ...]:
    field, names = listed_pictures(row)
    if not names and row.data.get(field) is None:
        return ()
    value = row.data[field]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise row.error(field, f"must be a path, a list of paths or absent, got {brief(value)}")
    return tuple(find_image(row, image_root, name, field) for name in names)


def listed_pictures(row: Row) -> tuple[str, list[Any]]:
    """The field of a row that names its pictures, `images` or `image`, and what the field lists.

    Raises:
        StreamError: If both fields name pictures and `images` has not those of `image`; or if neither does,
            and another field seems to hold pictures, which would not be read.
    """
    given = {field: _several(row.data.get(field)) for field in PICTURE_FIELDS}
    field = next((field for field, pictures in given.items() if pictures), PICTURE_FIELDS[-1])
    if any(picture not in given[field] for each in given.values() for picture in each):
        raise row.error(
            "images", f"must hold the pictures of 'image' too, got {brief(row.data['image'])} there"
        )
    for name, value in row.data.items() if not given[field] else ():
        unread = name not in PICTURE_FIELDS and _LIKE_PICTURES.search(str(name))
        if unread and any(map(_is_picture, _several(value))):
            raise row.error(str(name), f"must be named 'image' or 'images' to be read, got {brief(value)}")
    return field, given[field]


def _several(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _is_picture(value: Any) -> bool:
    """Whether a value is an opened picture, an encoded one, or the path of one."""
    name = value.get("path") if isinstance(value, dict) else value
    named = isinstance(name, str) and name.lower().endswith(PICTURE_SUFFIXES)
    return named or hasattr(value, "getpixel") or (isinstance(value, dict) and bool(value.get("bytes")))


def find_image(row: Row, image_root: Path, name: str, field: str = "image") -> Path:
    """The path of a picture that a row names.

    Raises:
        StreamError: If it is no path, lies outside of the image root, or is not an existing file.
    """
    if "\0" in name or not is_text(name):  # `is_file` would call such a file absent.
        raise row.error(field, f"must be a path, got {brief(name)}")
    path = image_root / name
    try:
        real = path.resolve() if path.is_symlink() else _real_folder(path.parent) / path.name
        inside, exists = real.is_relative_to(_real_folder(image_root)), real.is_file()
    except PATH_ERRORS as error:
        raise row.error(field, f"must be a path, got {brief(name)}: {one_line(error)}") from error
    if not inside:
        raise row.error(field, f"must stay under the image root {image_root}, got {brief(name)}")
    if not exists:
        raise row.error(field, f"must be an existing file, got {name!r:.300} (looked for {path!s:.300})")
    return path


@lru_cache(maxsize=65536)
def _real_folder(folder: Path) -> Path:
    return folder.resolve()


def load_rows(file: Path) -> list[Any]:
    """The rows of a JSON file that holds a list, or of JSON lines, by the file's name.

    Raises:
        StreamError: If the file cannot be read, is not JSON, or holds no row.
    """
    rows = _load_lines(file) if file.suffix in LINES else load_json(file)
    if not isinstance(rows, list) or not rows:
        raise StreamError(file, None, "(file)", f"must be a non-empty list of rows, got {brief(rows)}")
    return rows


def _load_lines(file: Path) -> list[Any]:
    rows: list[Any] = []
    # Only "\n" ends a line: JSON strings may hold the other separators of `splitlines`.
    for line in _read(file).split("\n"):
        if line.strip():
            try:
                rows.append(json.loads(line, parse_constant=_refuse_constant))
            except (ValueError, RecursionError) as error:
                raise StreamError(file, len(rows), "(row)", f"must be JSON, got {one_line(error)}") from error
    return rows


def load_json(file: Path) -> Any:
    """The value that a JSON file holds.

    Raises:
        StreamError: If the file cannot be read or is not JSON.
    """
    text = _read(file)
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except _Constant as error:
        raise StreamError(file, _row_of_constant(text), "(row)", f"must be JSON, got {error}") from error
    except (ValueError, RecursionError) as error:
        raise StreamError(file, None, "(file)", f"must be JSON, got {one_line(error)}") from error


def _row_of_constant(text: str) -> int | None:
    """The first row of a JSON list that holds NaN or infinity; None outside of a list."""
    rows = json.loads(text)
    for index, row in enumerate(rows if isinstance(rows, list) else []):
        try:
            json.dumps(row, allow_nan=False)
        except ValueError:
            return index
    return None


def _read(file: Path) -> str:
    try:
        # Opening a pipe would wait for its writer.
        if file.exists() and not file.is_file():
            raise StreamError(file, None, "(file)", "must be a readable file, got something that is no file")
        if (size := file.stat().st_size) > MAX_JSON_BYTES:
            raise StreamError(file, None, "(file)", f"must have at most {MAX_JSON_BYTES} bytes, got {size}")
        return file.read_text(encoding=UTF8)
    except OSError as error:
        raise StreamError(file, None, "(file)", f"must be a readable file, got {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise StreamError(file, None, "(file)", f"must be JSON, got {one_line(error)}") from error


class _Constant(ValueError):
    """A constant that JSON does not have."""


def _refuse_constant(name: str) -> None:
    raise _Constant(f"the constant {name}")


def is_folder(path: Path) -> bool:
    """Whether a path names an existing folder; one that cannot be a path does not."""
    try:
        return path.is_dir()
    except PATH_ERRORS:
        return False


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
