"""`cram predict`: answer one question, or a file of them, with a trained model.

A file holds one JSON object per line, `{"text": question, "question_id"?: id, "image"?: path or list of
paths}`, with paths relative to the file; `images` is another name of `image`. The answers are JSON lines
`{question_id, text, group, gates}`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from cram.atomic import write_text
from cram.commands.options import add_trained, load_trained
from cram.console import ProgressBar
from cram.learning.answers.predict import MAX_NEW_TOKENS, Answer, Turn, answer, answer_all
from cram.streams.readers import UTF8, Row, listed_pictures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_trained(parser)
    add_answering(parser)
    parser.add_argument("--image", action="append", default=[], metavar="I", help="picture; may repeat")
    parser.add_argument(
        "--questions", metavar="F", help="JSON lines with text, image, question_id; - is stdin"
    )
    parser.add_argument("--out", metavar="F", help="file of the answers to --questions (default: stdout)")
    parser.add_argument("question", nargs="?", help="what is asked")


def add_answering(parser: argparse.ArgumentParser) -> None:
    """Add what decides an answer beside its question."""
    parser.add_argument("--expert", metavar="NAME", help="this expert answers alone (default: the route)")
    text = f"length limit of an answer (default: {MAX_NEW_TOKENS})"
    parser.add_argument("--max-new-tokens", type=int, default=MAX_NEW_TOKENS, metavar="N", help=text)


def run(arguments: argparse.Namespace) -> None:
    """Answer, and say on stderr or in the rows how each answer was routed."""
    if (arguments.question is None) == (arguments.questions is None):
        given = "neither" if arguments.question is None else "both"
        raise ValueError(f"a question or --questions must be given, got {given}")
    if arguments.questions is not None and arguments.image:
        raise ValueError("--image must stand beside one question, got --questions")
    if arguments.questions is None and arguments.out is not None:
        raise ValueError("--out must stand beside --questions, got one question, whose answer is printed")
    rows = [] if arguments.questions is None else read_questions(arguments.questions)
    options = answering(arguments)
    if arguments.question is not None:
        turn = Turn.of(arguments.question, arguments.image)
        model, processor = load_trained(arguments)
        found = answer(model, turn.question, turn.images, processor=processor, **options)
        print(found.text)
        print(f"({found.routing()})", file=sys.stderr)
        return
    model, processor = load_trained(arguments)
    with ProgressBar("predict", len(rows)) as bar:
        turns = [[turn] for _, turn in rows]
        answers = answer_all(model, turns, processor=processor, bar=bar, **options)
    lines = "".join(_line(name, found) for (name, _), found in zip(rows, answers, strict=True))
    if arguments.out is None:
        sys.stdout.write(lines)
    else:
        Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
        write_text(Path(arguments.out), lines)


def answering(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `answer_all` that `add_answering` has read.

    Raises:
        ValueError: If the length limit is not positive.
    """
    if arguments.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {arguments.max_new_tokens}")
    return {"expert": arguments.expert, "max_new_tokens": arguments.max_new_tokens}


def read_questions(source: str) -> list[tuple[str, Turn]]:
    """The questions of a file of JSON lines with their ids; `-` reads stdin.

    Raises:
        ValueError: Naming the line and the field of the first fault, or if an id repeats or there is no row.
        OSError: If the file cannot be read.
    """
    text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding=UTF8)
    root = Path(".") if source == "-" else Path(source).parent
    found: dict[str, Turn] = {}
    # Only "\n" ends a line: JSON strings may hold the other separators of `splitlines`.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        name, turn = _read_row(line, f"{source}, line {number}", number, root)
        if name in found:
            raise ValueError(f"{source}, line {number}: question_id must be unique, got {name!r} again")
        found[name] = turn
    if not found:
        raise ValueError(f"{source} must hold at least one question, got none")
    return list(found.items())


def _read_row(line: str, where: str, number: int, root: Path) -> tuple[str, Turn]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: must be a JSON object, got {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: must be a JSON object, got {row!r:.80}")
    name = row.get("question_id", number)
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise ValueError(f"{where}: question_id must be a string or an integer, got {name!r:.80}")
    text, (field, paths) = row.get("text"), listed_pictures(Row(Path(where), None, row))
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: text must be a non-empty string, got {text!r:.80}")
    if not all(isinstance(path, str) and path and "\0" not in path for path in paths):
        raise ValueError(
            f"{where}: {field} must be a path, a list of paths or absent, got {row[field]!r:.80}"
        )
    if missing := [path for path in paths if not (root / path).is_file()]:
        raise ValueError(f"{where}: {field} must be an existing file, got {missing[0]!r} under {root}")
    return str(name), Turn.of(text, [root / path for path in paths])


def _line(name: str, found: Answer) -> str:
    row = {"question_id": name, "text": found.text, "group": found.group, "gates": found.gates}
    return json.dumps(row) + "\n"
