"""`cram export`: experts with fixed gates as a PEFT LoRA folder, or merged into the base model.

The gates come from a name (`--expert`), from numbers (`--gates`), or from pictures and a question, whose
route is taken as it is (`--image`, `--question`); several pictures give the mean of their routes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import Tensor

from cram.attach import attached
from cram.bundle.export import export_lora, export_merged, gate_table
from cram.commands.options import add_trained, load_trained
from cram.learning.answers.predict import Turn
from cram.model.attached import AttachedModel
from cram.streams.types import open_image


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_trained(parser)
    parser.add_argument("--out", required=True, metavar="F", help="folder that is written, new or empty")
    parser.add_argument("--expert", metavar="NAME", help="one expert with gate 1")
    parser.add_argument("--gates", nargs="+", metavar="NAME=GATE", help="experts with these gates")
    parser.add_argument("--question", metavar="T", help="experts with the gates of this question")
    text = "picture of the question; several give the mean of their routes"
    parser.add_argument("--image", action="append", default=[], metavar="I", help=text)
    parser.add_argument("--merge", action="store_true", help="write the base model with the experts merged")
    parser.add_argument(
        "--scale", type=float, metavar="S", help="alpha / r of the LoRA (default: the bundle's)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Export, and say which gates were used."""
    given = [name for name in ("expert", "gates", "question") if getattr(arguments, name) is not None]
    if len(given) != 1:
        raise ValueError(f"one of --expert, --gates and --question must be given, got {given or 'none'}")
    if arguments.image and arguments.question is None:
        raise ValueError(f"--image must stand with --question, got --{given[0]}")
    if arguments.merge and arguments.scale is not None:
        raise ValueError(f"--scale must stand without --merge, got {arguments.scale}")
    named = _named_gates(arguments.gates or [f"{arguments.expert}=1"]) if arguments.question is None else {}
    turns = _turns(arguments)
    model, processor = load_trained(arguments)
    cram = attached(model)
    gates = gate_table(cram, named if not turns else routed_gates(cram, turns))
    names = list(cram.expert_names)
    if arguments.merge:
        export_merged(model, arguments.out, gates, processor)
    else:
        export_lora(model, arguments.out, gates, arguments.scale)
    used = ", ".join(f"{n} {g:.4g}" for n, g in zip(names, gates.mean(0).tolist(), strict=True) if g)
    print(f"{arguments.out}: {'base model merged with' if arguments.merge else 'LoRA of'} {used}")


def routed_gates(cram: AttachedModel, turns: list[Turn]) -> Tensor:
    """The mean gates [L, E] of some samples, which must fall into one group.

    Raises:
        ValueError: If the method does not route by a query or the samples fall into several groups.
    """
    if not cram.method.expert_groups():
        raise ValueError(
            f"method must have instruction groups to take gates from a question, got {cram.method.name!r}; "
            "give --gates"
        )
    images = [[open_image(image) for image in turn.images] for turn in turns]
    route = cram.route(cram.encode([turn.question for turn in turns], images))
    assert route.groups is not None
    groups = sorted(set(route.groups.tolist()))
    if len(groups) != 1:
        raise ValueError(f"samples must fall into one instruction group, got groups {groups}")
    return route.gates.double().mean(1)


def _turns(arguments: argparse.Namespace) -> list[Turn]:
    if arguments.question is None:
        return []
    if missing := [image for image in arguments.image if not Path(image).is_file()]:
        raise ValueError(f"--image must be a file, got {missing[0]!r}")
    return [Turn.of(arguments.question, image) for image in arguments.image or [None]]


def _named_gates(pairs: list[str]) -> dict[str, float]:
    gates: dict[str, float] = {}
    for pair in pairs:
        name, _, number = pair.rpartition("=")
        try:
            gates[name] = float(number)
        except ValueError:
            name = ""
        if not name:
            raise ValueError(f"--gates must be NAME=GATE with a number, got {pair!r}")
    return gates
