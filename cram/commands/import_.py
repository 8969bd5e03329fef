"""`cram import`: a PEFT LoRA folder becomes an expert, to which samples of its task lead the route.

With `--released` a checkpoint of CRAM's released code is converted as a whole.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import nn

from cram.attach import attach, attached
from cram.bundle.bundle import save
from cram.bundle.importer import import_lora
from cram.bundle.released import import_released
from cram.commands.options import CONFIG_HELP, add_trained, base_sources, load_trained, parse_config
from cram.commands.predict import read_questions
from cram.learning.answers.predict import Turn
from cram.streams.types import open_image


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("lora", metavar="LORA", help="folder with adapter_config.json")
    parser.add_argument("--task", metavar="NAME", help="name of the task and the expert")
    text = "LORA is a checkpoint of the released code; names of its tasks, in their order"
    parser.add_argument("--released", nargs="+", metavar="NAME", help=text)
    parser.add_argument("--images", default=[], nargs="+", metavar="I", help="pictures of the task")
    text = "questions of the task: one for each picture, or one for all"
    parser.add_argument("--instructions", default=[], nargs="+", metavar="T", help=text)
    text = "JSON lines with text and image, in place of --images and --instructions"
    parser.add_argument("--samples", metavar="F", help=text)
    parser.add_argument("--out", required=True, metavar="B2", help="bundle that is written")
    text = f"for a new bundle, without --run and --bundle: {CONFIG_HELP}"
    parser.add_argument("--config", default=[], nargs="+", metavar="KEY=VALUE", help=text)
    add_trained(parser)


def run(arguments: argparse.Namespace) -> None:
    """Import, and write the new bundle."""
    if (arguments.task is None) == (arguments.released is None):
        given = "neither" if arguments.task is None else "both"
        raise ValueError(f"--task or --released must be given, got {given}")
    if arguments.released is not None:
        convert(arguments)
        return
    turns = read_turns(arguments)
    model = _target(arguments)
    cram = attached(model)
    images = [[open_image(image) for image in turn.images] for turn in turns]
    questions = [turn.question for turn in turns]
    group = import_lora(cram, arguments.lora, arguments.task, questions, images)
    save(model, arguments.out)
    ranks = cram.expert_ranks(cram.num_experts - 1)
    used = [rank for rank in ranks.values() if rank]
    print(
        f"{arguments.out}: expert {arguments.task} of {len(used)} linears, ranks {min(used)} to {max(used)}, "
        f"group {group}, {cram.num_experts} experts"
    )


def convert(arguments: argparse.Namespace) -> None:
    """Convert a checkpoint of the released code, and write a bundle.

    Raises:
        ValueError: If samples, a run or a bundle are given: the checkpoint has routes and experts of its own.
    """
    names = ("images", "instructions", "samples", "run", "bundle")
    if given := [name for name in names if getattr(arguments, name)]:
        raise ValueError(f"--{given[0]} must stand without --released, got {getattr(arguments, given[0])}")
    model = _target(arguments)
    experts = import_released(attached(model), arguments.lora, arguments.released)
    save(model, arguments.out)
    print(f"{arguments.out}: experts {', '.join(experts)}")


def read_turns(arguments: argparse.Namespace) -> list[Turn]:
    """The samples that the arguments name.

    Raises:
        ValueError: If there is none, or pictures and questions do not fit together.
    """
    images, texts = arguments.images, arguments.instructions
    if (arguments.samples is None) == (not texts):
        given = "neither" if arguments.samples is None else "both"
        raise ValueError(f"--samples or --instructions must be given, got {given}")
    if arguments.samples is not None:
        if images:
            raise ValueError(f"--images must stand with --instructions, got them with --samples {images[:3]}")
        return [turn for _, turn in read_questions(arguments.samples)]
    if images and len(texts) not in (1, len(images)):
        raise ValueError(
            f"--instructions must be one, or one for each of {len(images)} images, got {len(texts)}"
        )
    if missing := [image for image in images if not Path(image).is_file()]:
        raise ValueError(f"--images must be files, got {missing[0]!r}")
    if not images:
        return [Turn.of(text) for text in texts]
    spread = texts * len(images) if len(texts) == 1 else texts
    return [Turn.of(text, image) for text, image in zip(spread, images, strict=True)]


def _target(arguments: argparse.Namespace) -> nn.Module:
    """The model that the expert joins: with the experts of a run or a bundle, or without any."""
    if arguments.run is None and arguments.bundle is None:
        model, processor, encoder = base_sources(arguments).load(arguments.device)
        fixed: dict[str, Any] = {}
        attach(model, parse_config(arguments.config, "", fixed), encoder, processor)
        return model
    if arguments.config:
        raise ValueError(f"--config must stand without --run and --bundle, got {arguments.config}")
    return load_trained(arguments)[0]
