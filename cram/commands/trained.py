"""The trained model that a command is given: a run's newest state, or a bundle on its base model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import nn

from cram.bundle.bundle import load
from cram.bundle.runs import read_run
from cram.commands.options import add_device, add_dtype
from cram.loading import Sources


def add_trained(parser: argparse.ArgumentParser) -> None:
    """Add `--run`, or `--bundle` with `--model` and `--clip`, and where the model runs."""
    parser.add_argument("--run", metavar="R", help="run folder; its newest state is used")
    parser.add_argument("--bundle", metavar="B", help="bundle, with --model in place of --run")
    parser.add_argument("--model", metavar="M", help="folder or name of the base model, or builtin")
    parser.add_argument("--clip", metavar="C", help="folder or name of the CLIP that routes")
    add_dtype(parser)
    add_device(parser)


def load_trained(arguments: argparse.Namespace) -> tuple[nn.Module, Any]:
    """The attached model and its processor.

    Raises:
        ValueError: Unless there is either a run or a bundle with its base model.
    """
    if (arguments.run is None) == (arguments.bundle is None):
        raise ValueError("--run or --bundle must be given, got " + ("both" if arguments.run else "neither"))
    if arguments.run is not None:
        settings = read_run(Path(arguments.run))["settings"]
        sources = Sources(
            arguments.model or settings["model"], arguments.clip or settings["clip"], settings["dtype"]
        )
    else:
        sources = base_sources(arguments)
    model, processor, encoder = sources.load(arguments.device)
    load(model, arguments.run or arguments.bundle, encoder, processor)
    return model, processor


def base_sources(arguments: argparse.Namespace) -> Sources:
    """The base model and the CLIP that `--model`, `--clip` and `--dtype` name.

    Raises:
        ValueError: Without `--model`.
    """
    if arguments.model is None:
        raise ValueError("--model must name the bundle's base model, got none")
    return Sources(arguments.model, arguments.clip, arguments.dtype)
