"""Rows as the training tools of the field write them, from JSON, JSON lines, or a data set in memory.

    {"messages": [{"role": "user", "content": "<image>How many?"}, {"role": "assistant", "content": "two"}],
     "images": ["1.png"]}                                    content may be a list of text and image parts
    {"prompt": "How many?", "completion": "two", "image": "1.png"}       each may be a list of messages
    {"conversations": [{"from": "human", "value": "."}, {"from": "gpt", "value": "."}], "image": ["1.png"]}

A row is one question and one answer. Pictures are paths under the image root, opened images, or objects with
`bytes` or `path`. Whatever a sample cannot keep is refused: a system message, further turns, a picture in an
answer, a placeholder inside of a text, a number of placeholders that is not the number of pictures.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cram.streams.readers import IMAGE_PLACEHOLDER, StreamError
from cram.streams.types import Sample, Stream, Task

if TYPE_CHECKING:
    from PIL import Image

ROLES = {"human": "user", "gpt": "assistant"}
Said = tuple[str, str, list[Any]]  # role, text, pictures that stand in the content itself


def stream_from_datasets(
    name: str,
    tasks: Mapping[str, tuple[Iterable[Mapping[str, Any]], Iterable[Mapping[str, Any]]]],
    *,
    scorer: str = "accuracy",
    max_new_tokens: int = 64,
    image_root: str | Path | None = None,
) -> Stream:
    """A stream from rows in memory, such as data sets of Hugging Face.

    Args:
        name: Name of the stream.
        tasks: Task -> (training rows, test rows), in the order in which they are learnt.
        scorer: A name in `cram.scoring.scorers.SCORERS`, for all tasks.
        max_new_tokens: Length limit of an answer.
        image_root: Folder that pictures given by path must lie in.

    Raises:
        StreamError: For the first fault; the place is "task/train" or "task/test" with the row.
    """
    root = None if image_root is None else Path(image_root)
    made = [
        Task(
            task,
            samples_of(train, Path(task, "train"), root),
            samples_of(test, Path(task, "test"), root),
            scorer,
            max_new_tokens,
        )
        for task, (train, test) in tasks.items()
    ]
    return Stream(name, tuple(made))


def read_messages(file: str | Path, image_root: str | Path) -> list[Sample]:
    """The samples of a JSON list or of JSON lines.

    Raises:
        StreamError: For the first fault found; rows count from 0.
    """
    file = Path(file)
    try:
        text = file.read_text(encoding="utf-8")
        # Only "\n" ends a line: JSON strings may hold the other separators of `splitlines`.
        lines = [line for line in text.split("\n") if line.strip()]
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in lines]
    except OSError as error:
        raise StreamError(file, None, "(file)", f"must be a readable file, got {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise StreamError(file, None, "(file)", f"must be JSON or JSON lines, got {error}") from error
    return samples_of(rows, file, Path(image_root))


def samples_of(rows: Iterable[Mapping[str, Any]], place: Path, image_root: Path | None) -> list[Sample]:
    """The samples of rows, checked one by one; ids are those of the rows, else their numbers.

    Args:
        rows: The rows.
        place: Where the rows come from, for error messages.
        image_root: Folder that pictures given by path must lie in; None refuses paths.

    Raises:
        StreamError: For the first fault, or if there is no row or an id repeats.
    """
    samples: list[Sample] = []
    seen: set[str] = set()
    for number, row in enumerate(rows):

        def fault(field: str, text: str, number: int = number) -> StreamError:
            return StreamError(place, number, field, text)

        if not isinstance(row, Mapping):
            raise fault("(row)", f"must be an object, got {row!r:.80}")
        sample = _sample(row, str(row.get("id", row.get("question_id", number))), image_root, fault, place)
        if sample.id in seen:
            raise fault("id", f"must be unique, got {sample.id!r} again")
        seen.add(sample.id)
        samples.append(sample)
    if not samples:
        raise StreamError(place, None, "(file)", "must hold at least one row, got none")
    return samples


Fault = Callable[[str, str], StreamError]


def _sample(row: Mapping[str, Any], name: str, root: Path | None, fault: Fault, place: Path) -> Sample:
    turns = _turns(row, fault)
    roles = [role for role, _, _ in turns]
    if roles != ["user", "assistant"]:
        raise fault("messages", f"must be one 'user' and one 'assistant' message, got {roles}")
    (_, question, shown), (_, answer, drawn) = turns
    if drawn:
        raise fault("messages", "must have pictures in the question alone, got one in the answer")
    listed = row.get("images", row.get("image"))
    several = listed if isinstance(listed, list | tuple) else [] if listed is None else [listed]
    inside = [picture for picture in shown if picture is not None]
    if inside and several:
        raise fault("images", "must stand in the content or beside it, got both")
    images = tuple(_picture(each, root, fault) for each in inside or several)
    text, placeholders = _without_placeholders(question, fault)
    wanted = placeholders + len(shown)
    if wanted not in (0, len(images)):
        raise fault("images", f"must be one per placeholder, got {len(images)} for {wanted} placeholders")
    for field, said in (("question", text), ("answer", answer)):
        if not said.strip():
            raise fault(field, "must be a non-empty text, got none")
        if IMAGE_PLACEHOLDER in said:
            raise fault(
                field, f"must have {IMAGE_PLACEHOLDER} only before or after a question, got it inside"
            )
    return Sample(name, images, text, answer.strip(), (), f"{place}, row {name}")


def _turns(row: Mapping[str, Any], fault: Fault) -> list[Said]:
    if "messages" in row:
        return _messages(row["messages"], "messages", fault)
    if "conversations" in row:
        return _messages(row["conversations"], "conversations", fault)
    if "prompt" not in row or "completion" not in row:
        known = "messages, conversations, or prompt and completion"
        raise fault("(row)", f"must have {known}, got the keys {sorted(map(str, row))}")
    found = []
    for field, role in (("prompt", "user"), ("completion", "assistant")):
        said = row[field]
        found += [(role, said, [])] if isinstance(said, str) else _messages(said, field, fault)
    return found


def _messages(value: object, field: str, fault: Fault) -> list[Said]:
    if not isinstance(value, list | tuple) or not all(isinstance(each, Mapping) for each in value):
        raise fault(field, f"must be a list of messages, got {value!r:.80}")
    found = []
    for index, each in enumerate(value):
        where = f"{field}[{index}]"
        role = each.get("role", each.get("from"))
        text, pictures = _content(each.get("content", each.get("value")), where, fault)
        found.append((ROLES.get(str(role), str(role)), text, pictures))
    return found


def _content(content: object, where: str, fault: Fault) -> tuple[str, list[Any]]:
    """Text and pictures of one message; a part without its own picture counts as a placeholder, None."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, Sequence) or not all(isinstance(part, Mapping) for part in content):
        raise fault(where, f"must have text or a list of parts as content, got {content!r:.80}")
    texts, pictures = [], []
    for part in content:
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif part.get("type") == "image":
            pictures.append(next((part[key] for key in ("image", "path", "url") if part.get(key)), None))
        else:
            raise fault(where, f"must have parts of type text or image, got {part!r:.80}")
    if len(texts) > 1:
        raise fault(where, f"must have one part of text, got {len(texts)}")
    return "".join(texts), pictures


def _without_placeholders(question: str, fault: Fault) -> tuple[str, int]:
    """The question without the placeholders at its ends, and how many those are."""
    text, count = question.strip(), 0
    for cut in (str.removeprefix, str.removesuffix):
        while (rest := cut(text, IMAGE_PLACEHOLDER)) != text:
            text, count = rest.strip(), count + 1
    return text, count


def _picture(value: Any, root: Path | None, fault: Fault) -> Image.Image | Path:
    """One picture of a row; encoded bytes are opened, a path is only looked up."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(value, Image.Image):
        return value
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        try:
            return Image.open(io.BytesIO(value["bytes"]))
        except UnidentifiedImageError as error:
            raise fault("images", f"must be pictures, got bytes of another kind: {error}") from error
    name = value.get("path") if isinstance(value, Mapping) else value
    if not isinstance(name, str | Path) or not str(name) or "\0" in str(name):
        raise fault("images", f"must be pictures or paths, got {value!r:.80}")
    if root is None:
        raise fault("images", f"must lie under an image root for {str(name)!r}, got no root")
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise fault("images", f"must stay under the image root {root}, got {str(name)!r}")
    if not path.is_file():
        raise fault("images", f"must be existing files, got {str(name)!r} (looked for {path})")
    return path
