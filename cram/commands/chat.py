"""`cram chat`: a conversation with a trained model in the terminal.

A line is a question. `/image PATH` shows a picture with the next question, `/new` starts over, `/quit` or the
end of the input ends. Every answer is followed by how it was routed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from cram.commands.options import add_trained, load_trained
from cram.commands.predict import add_answering, answering
from cram.learning.answers.predict import Conversation
from cram.streams.types import open_image

HELP = "a line is a question; /image PATH shows a picture with the next one, /new starts over, /quit ends"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_trained(parser)
    add_answering(parser)
    parser.add_argument("--image", action="append", default=[], metavar="I", help="picture; may repeat")


def run(arguments: argparse.Namespace) -> None:
    """Answer line by line."""
    options = answering(arguments)
    pictures = [Path(image) for image in arguments.image]
    for picture in pictures:
        open_image(picture)
    model, processor = load_trained(arguments)
    chat = Conversation(model, processor=processor, **options)
    print(HELP, file=sys.stderr)
    for line in _lines():
        command, _, rest = line.partition(" ")
        try:
            if command == "/quit":
                return
            if command == "/new":
                chat, pictures = Conversation(model, processor=processor, **options), []
            elif command == "/image":
                open_image(Path(rest.strip()))
                pictures.append(Path(rest.strip()))
            elif command.startswith("/"):
                print(f"cram: no command {command!r}; {HELP}", file=sys.stderr)
            else:
                found = chat.ask(line, pictures)
                pictures = []
                print(found.text)
                print(f"({found.routing()})", file=sys.stderr)
        except ValueError as error:
            # A wrong question or picture is no reason to lose the conversation.
            print(f"cram: {error}", file=sys.stderr)


def _lines() -> Iterator[str]:
    """The lines of stdin that say something, after a prompt on a terminal."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
