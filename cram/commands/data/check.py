"""`cram check`: counts, pictures and overlap of a stream, and a manifest with hashes."""

from __future__ import annotations

import argparse
from pathlib import Path

from cram.atomic import write_json
from cram.commands.options import check_data_root
from cram.streams import load_stream
from cram.streams.check import check_stream, manifest_lines
from cram.streams.registry import BUILTIN, stream_content


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("stream", help="name of a stream, or a stream file")
    parser.add_argument("--data-root", metavar="D", help="folder of the data")
    parser.add_argument("--pictures", action="store_true", help="open and hash every picture (slow)")
    parser.add_argument("--out", metavar="FILE", help="write the manifest as JSON")


def run(arguments: argparse.Namespace) -> None:
    """Check, and print the manifest.

    Raises:
        ValueError: If something differs from what was published, or test samples are in the training data.
    """
    check_data_root(arguments.stream, arguments.data_root)
    stream = load_stream(arguments.stream, data_root=arguments.data_root)
    described = {} if arguments.stream in BUILTIN else stream_content(arguments.stream)[1]
    manifest = check_stream(stream, described, arguments.pictures)
    print("\n".join(manifest_lines(manifest)))
    if arguments.out:
        write_json(Path(arguments.out), manifest)
    if faults := manifest["faults"]:
        raise ValueError(f"{stream.name} must be as published, got {len(faults)} faults; first: {faults[0]}")
