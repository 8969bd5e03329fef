"""The command `cram`: finds the subcommand's module in `cram.commands` and runs it.

Faults that a user can mend (a wrong path, an unknown name, damaged data) end with one line and exit code 2.
A command that ended so can be repeated: nothing that it wrote stands in the way.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from keyword import iskeyword
from types import ModuleType

from cram import __version__
from cram.console import KNOWN_ERRORS, first_line, namesake, quiet_transformers

# Subcommand -> what it does. Its module in `cram.commands` has `add_arguments(parser)` and `run(arguments)`.
# A subcommand that is a keyword of Python has an underscore behind its module's name.
COMMANDS = {
    "check": "compare the data of a stream with what was published, before anything is trained",
    "train": "learn a stream of tasks, one after another",
    "eval": "test the newest state of a run",
    "predict": "answer questions about pictures with a trained model",
    "chat": "hold a conversation with a trained model",
    "import": "make an expert of a LoRA that PEFT has written",
    "export": "write experts as a PEFT LoRA, or merged into the base model",
    "compare": "compare methods, seed by seed, on one stream",
    "demo": "compare CRAM with one LoRA for all tasks, and with one LoRA per task that is told the task",
    "serve": "answer questions over HTTP, with the experts of a bundle",
    "bench": "time the expert layer against its baselines (source checkout only)",
    "info": "show the installation, or what a run, a bundle or a model folder holds",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    if (other := namesake()) is not None:
        print(f"cram: {other}", file=sys.stderr)
    try:
        arguments = parser_for(words).parse_args(words)
        quiet_transformers()
        _module(arguments.command).run(arguments)
    except KNOWN_ERRORS as error:
        print(f"cram: {first_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        text = str(stop) or "stopped; the same command goes on from the last checkpoint or finished task"
        print(f"\ncram: {text}", file=sys.stderr)
        return 130
    return 0


# Subcommands whose modules stand in a folder of `cram.commands`.
FOLDERS = {"check": "data"}


def _module(command: str) -> ModuleType:
    name = f"{command}_" if iskeyword(command) else command
    if command in FOLDERS:
        name = f"{FOLDERS[command]}.{name}"
    return import_module(f"cram.commands.{name}")


def parser_for(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for a command line; only the module of the subcommand in `words` is imported."""
    parser = argparse.ArgumentParser(prog="cram", description="Continual learning of multimodal models")
    parser.add_argument("--version", action="version", version=f"cram {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((word for word in words if word in COMMANDS), None)
    for name, summary in COMMANDS.items():
        subparser = commands.add_parser(name, help=summary, description=summary)
        if name == chosen:
            _module(name).add_arguments(subparser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
