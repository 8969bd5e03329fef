"""`cram bench`: a source checkout's benchmarks. They import this package, so they run as a process."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from cram.commands.options import add_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--quick", action="store_true", help="fewer cases, under two minutes")
    add_device(parser)
    parser.add_argument("--out", metavar="D", help="folder (default: by machine)")


def run(arguments: argparse.Namespace) -> None:
    """Run the benchmarks; exits with their code where it is not 0."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "__main__.py").is_file():
        raise ValueError(f"cram bench must run from a source checkout with its benchmarks, got {root}")
    options = ["--quick"] if arguments.quick else []
    options += ["--device", arguments.device] if arguments.device else []
    options += ["--out", str(Path(arguments.out).resolve())] if arguments.out else []
    code = subprocess.run([sys.executable, "-m", "benchmarks", *options], cwd=root, check=False).returncode
    if code:
        sys.exit(code)
