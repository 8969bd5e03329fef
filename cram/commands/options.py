"""What several subcommands share: arguments, and a configuration from KEY=VALUE pairs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

from cram.config import CramConfig

# Presets of the streams with published settings; any other stream starts from the defaults.
PRESETS: dict[str, Callable[..., CramConfig]] = {"ucit": CramConfig.ucit, "trigap": CramConfig.trigap}


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add `--data-root` and `--limit`."""
    parser.add_argument("--data-root", metavar="D", help="folder of the data")
    parser.add_argument("--limit", type=int, metavar="N", help="samples a split at most")


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Add `--dtype`."""
    text = "float32, bfloat16 or float16 of the base (default: float32)"
    parser.add_argument("--dtype", default="float32", help=text)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add `--device`."""
    parser.add_argument("--device", help="such as cpu or cuda (default: cuda if there is one)")


def parse_config(
    pairs: Sequence[str], stream: str, fixed: dict[str, Any], defaults: dict[str, Any] | None = None
) -> CramConfig:
    """A configuration from KEY=VALUE pairs over the stream's preset.

    Args:
        pairs: A value is read as JSON where it is JSON, else as text.
        stream: Name of the stream.
        fixed: Fields from other options; a None is left out.
        defaults: Fields that the pairs may change.

    Raises:
        ValueError: If a pair has no `=`, or a field is unknown or wrong.
    """
    values = dict(defaults or {})
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"--config must be KEY=VALUE, got {pair!r}")
        try:
            values[key] = json.loads(text)
        except json.JSONDecodeError:
            values[key] = text
    values.update({key: value for key, value in fixed.items() if value is not None})
    preset = PRESETS.get(stream, lambda **changes: CramConfig.from_dict(changes))
    return preset(**values)
