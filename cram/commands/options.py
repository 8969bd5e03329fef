"""What several subcommands share: arguments, a configuration from KEY=VALUE pairs, the trained model."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from cram.bundle.bundle import load
from cram.config import CramConfig
from cram.learning.run_folder import BASE_SETTINGS, run_settings
from cram.loading import Sources
from cram.streams.registry import BUILTIN, SHIPPED, stream_training

# Presets of the streams with published settings; any other stream starts from the defaults.
PRESETS: dict[str, Callable[..., CramConfig]] = {"ucit": CramConfig.ucit, "trigap": CramConfig.trigap}
# Help of options that several commands have.
MODEL_HELP = "base model: a folder, a name of the model hub, builtin or builtin-real"
STREAM_HELP = f"stream of tasks: {', '.join([*BUILTIN, *SHIPPED])}, or the path of a stream file"
CLIP_HELP = "folder or name of the CLIP that routes (default: the base's own, or the paper's)"
CONFIG_HELP = "fields of CramConfig such as learning_rate=0.003; help(cram.CramConfig) lists them"


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add `--data-root` and `--limit`."""
    parser.add_argument("--data-root", metavar="D", help="folder of the data")
    parser.add_argument("--limit", type=int, metavar="N", help="samples per split at most")


def check_data_root(stream: str, data_root: str | None) -> None:
    """Refuse a folder of data for a stream that has none.

    Raises:
        ValueError: If the stream is a built-in one and a folder is given.
    """
    if data_root is not None and stream in BUILTIN:
        raise ValueError(f"--data-root must stand with a stream file, got it with {stream}: {data_root!r}")


def add_order(parser: argparse.ArgumentParser) -> None:
    """Add `--order`."""
    text = "order of the tasks: 0 is the stream's own (default), each other number is one fixed shuffle"
    parser.add_argument("--order", default=0, type=int, metavar="N", help=text)


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Add `--dtype`."""
    text = "float32, bfloat16 or float16 of the base (default: float32)"
    parser.add_argument("--dtype", default="float32", help=text)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add `--device`."""
    parser.add_argument("--device", help="such as cpu or cuda (default: cuda if there is one)")


def refuse_several_processes(command: str) -> None:
    """Refuse to run as one of several processes, which would all write the same folder.

    Raises:
        ValueError: If a launcher (torchrun, accelerate) has set WORLD_SIZE above 1.
    """
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise ValueError(
            f"cram {command} must run as one process, got WORLD_SIZE={processes}; start it without "
            "torchrun or accelerate launch"
        )


def parse_config(
    pairs: Sequence[str], stream: str, fixed: dict[str, Any], defaults: dict[str, Any] | None = None
) -> CramConfig:
    """A configuration from KEY=VALUE pairs over the stream's preset and its file's published settings.

    Args:
        pairs: A value is read as JSON where it is JSON, else as text.
        stream: Name of the stream.
        fixed: Fields from other options; a None is left out.
        defaults: Fields that the pairs may change.

    Raises:
        ValueError: If a pair has no `=`, its field is given by another option as well, or a field is unknown
            or wrong.
    """
    values = {**stream_training(stream), **(defaults or {})}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"--config must be KEY=VALUE, got {pair!r}")
        if (other := fixed.get(key)) is not None:
            raise ValueError(
                f"{key} must be given once, got --config {pair} and {other!r} from its own option"
            )
        try:
            values[key] = json.loads(text)
        except json.JSONDecodeError:
            values[key] = text
    values.update({key: value for key, value in fixed.items() if value is not None})
    preset = PRESETS.get(stream, lambda **changes: CramConfig.from_dict(changes))
    return preset(**values)


def add_trained(parser: argparse.ArgumentParser) -> None:
    """Add `--run`, or `--bundle` with `--model` and `--clip`, and where the model runs."""
    parser.add_argument("--run", metavar="R", help="run folder; its newest state is used")
    parser.add_argument(
        "--bundle", metavar="B", help="folder of a bundle, in place of --run; --model must name its base"
    )
    parser.add_argument("--model", metavar="M", help=MODEL_HELP)
    parser.add_argument("--clip", metavar="C", help=CLIP_HELP)
    text = "float32, bfloat16 or float16 of the base (default: the run's, with --bundle float32)"
    parser.add_argument("--dtype", help=text)
    add_device(parser)


def load_trained(arguments: argparse.Namespace) -> tuple[nn.Module, Any]:
    """The attached model and its processor.

    Raises:
        ValueError: Unless there is either a run or a bundle with its base model.
    """
    if (arguments.run is None) == (arguments.bundle is None):
        raise ValueError("--run or --bundle must be given, got " + ("both" if arguments.run else "neither"))
    if arguments.run is not None:
        given = {name: getattr(arguments, name) for name in BASE_SETTINGS}
        settings = run_settings(Path(arguments.run), BASE_SETTINGS, given)
        sources = Sources(*(settings[name] for name in BASE_SETTINGS))
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
    return Sources(arguments.model, arguments.clip, arguments.dtype or "float32")
