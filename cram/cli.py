"""The command `cram`: train, eval, compare, demo, bench, info.

Faults that a user can mend (a wrong path, an unknown name, damaged data) end with one line and exit code 2;
nothing has been written then that a second attempt would trip over.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cram import __version__
from cram.config import CramConfig
from cram.faults import KNOWN_ERRORS, first_line
from cram.progress import quiet_transformers

# Presets of the streams with published settings; any other stream starts from the defaults.
PRESETS: dict[str, Callable[..., CramConfig]] = {"ucit": CramConfig.ucit, "trigap": CramConfig.trigap}

Arguments = tuple[tuple[str, dict[str, Any]], ...]

_DTYPE = {"default": "float32", "help": "float32, bfloat16 or float16 of the base (default: float32)"}
_DEVICE = {"default": None, "help": "such as cpu or cuda (default: cuda if there is one)"}
_DATA: Arguments = (
    ("--data-root", {"default": None, "metavar": "D", "help": "folder of the data"}),
    ("--limit", {"default": None, "type": int, "metavar": "N", "help": "samples a split at most"}),
)


@dataclass(frozen=True)
class Command:
    """One subcommand: what it does in a line, its arguments for argparse, its function."""

    help: str
    run: Callable[[argparse.Namespace], None]
    arguments: Arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        quiet_transformers()
        COMMANDS[arguments.command].run(arguments)
    except KNOWN_ERRORS as error:
        print(f"cram: {first_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ncram: stopped; the same command goes on from the last finished task", file=sys.stderr)
        return 130
    return 0


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


def train(arguments: argparse.Namespace) -> None:
    """`cram train`."""
    from cram.learner import ContinualLearner
    from cram.loading import Sources
    from cram.methods import METHODS
    from cram.scoring.report import write_page
    from cram.streams import load_stream

    if arguments.method not in METHODS:
        raise ValueError(f"method must be one of {sorted(METHODS)}, got {arguments.method!r}")
    checkpointing = True if arguments.gradient_checkpointing else None
    options = {"seed": arguments.seed, "gradient_checkpointing": checkpointing}
    config = parse_config(arguments.config, arguments.stream, options)
    stream = load_stream(arguments.stream, config.seed, arguments.limit, arguments.data_root)
    names = ("model", "clip", "dtype", "stream", "limit", "data_root")
    settings = {name: getattr(arguments, name) for name in names}
    model, processor, encoder = Sources(arguments.model, arguments.clip, arguments.dtype).load(
        arguments.device
    )
    out = Path(arguments.out)
    ContinualLearner(
        model, processor, stream, config, arguments.method, out=out, encoder=encoder, settings=settings
    ).run()
    print(f"report: {write_page(out)}")


def evaluate(arguments: argparse.Namespace) -> None:
    """`cram eval`: test a run's newest state, by default on the tasks that it has learnt."""
    from cram.loading import Sources
    from cram.rerun import evaluate_run
    from cram.runs import newest_bundle, read_run
    from cram.streams import Stream, load_stream

    folder = Path(arguments.run)
    run = read_run(folder)
    _, learnt = newest_bundle(folder)
    given = {name: getattr(arguments, name) for name in ("stream", "limit", "data_root")}
    settings = {**run["settings"], **{name: value for name, value in given.items() if value is not None}}
    seed = run["identity"]["config"]["seed"]
    stream = load_stream(settings["stream"], seed, settings["limit"], settings["data_root"])
    if arguments.stream is None:
        stream = Stream(stream.name, tuple(task for task in stream.tasks if task.name in learnt))
    sources = Sources(settings["model"], settings["clip"], settings["dtype"])
    evaluate_run(folder, stream, *sources.load(arguments.device))


def compare(arguments: argparse.Namespace) -> None:
    """`cram compare`."""
    from cram.compare import (
        FULL_SEEDS,
        QUICK,
        QUICK_SEEDS,
        QUICK_TESTS,
        SMALL_BASE,
        Comparison,
        run_comparison,
    )
    from cram.entries import ABLATIONS, entries
    from cram.loading import BUILTIN, Sources
    from cram.methods import METHODS
    from cram.scoring.report import write_page
    from cram.scoring.table import write_table

    quick = arguments.quick
    defaults = {**(SMALL_BASE if arguments.model == BUILTIN else {}), **(QUICK if quick else {})}
    methods = tuple(METHODS) if arguments.methods is None else arguments.methods
    ablations = tuple(ABLATIONS) if arguments.ablations == [] else arguments.ablations or ()
    out = Path(arguments.out)
    comparison = Comparison(
        out=out,
        entries=tuple(entries(methods, ablations)),
        seeds=(QUICK_SEEDS if quick else FULL_SEEDS) if arguments.seeds is None else arguments.seeds,
        config=parse_config(arguments.config, arguments.stream, {}, defaults),
        sources=Sources(arguments.model, arguments.clip, arguments.dtype),
        stream=arguments.stream,
        limit=arguments.limit,
        data_root=arguments.data_root,
        tests=QUICK_TESTS if quick else None,
        device=arguments.device,
    )
    report = run_comparison(comparison, arguments.jobs)
    print_table(report)
    print(f"table: {write_table(out, report)}")
    print(f"report: {write_page(out)}")


def demo(arguments: argparse.Namespace) -> None:
    """`cram demo`."""
    from cram.demo import FULL, METHODS_SHOWN, QUICK, run_demo
    from cram.scoring.report import write_page

    report = run_demo(
        arguments.out,
        seeds=arguments.seeds,
        methods=arguments.methods or METHODS_SHOWN,
        settings=QUICK if arguments.quick else FULL,
        dtype=arguments.dtype,
        device=arguments.device,
    )
    print_table(report)
    print(f"report: {write_page(Path(arguments.out))}")


def info(arguments: argparse.Namespace) -> None:
    """`cram info`."""
    from cram.info import describe_path, installation

    print("\n".join(installation() if arguments.path is None else describe_path(Path(arguments.path))))


def bench(arguments: argparse.Namespace) -> None:
    """`cram bench`: a source checkout's benchmarks. They import this package, so they run as a process."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "benchmarks" / "__main__.py").is_file():
        raise ValueError(f"cram bench must run from a source checkout with its benchmarks, got {root}")
    options = ["--quick"] if arguments.quick else []
    options += ["--device", arguments.device] if arguments.device else []
    options += ["--out", str(Path(arguments.out).resolve())] if arguments.out else []
    code = subprocess.run([sys.executable, "-m", "benchmarks", *options], cwd=root, check=False).returncode
    if code:
        sys.exit(code)


def print_table(report: Any) -> None:
    """Print the methods' metrics, mean over seeds."""
    from cram.scoring.columns import in_order
    from cram.scoring.schema import METRIC_NAMES
    from cram.scoring.summary import summarise

    methods = in_order(summarise(report))
    width = max(len(method.name) for method in methods)
    print(" " * width + "".join(f"{name:>12}" for name in (*METRIC_NAMES, "parameters")))
    for method in methods:
        cells = "".join(f"{method.metrics[name].mean:12.2f}" for name in METRIC_NAMES)
        print(f"{method.name:{width}}{cells}{round(method.parameters.mean):12,}")


COMMANDS: dict[str, Command] = {
    "train": Command(
        "learn a stream of tasks, one after another",
        train,
        (
            ("--model", {"required": True, "help": "folder or name of the base model, or builtin"}),
            ("--stream", {"required": True, "help": "builtin, ucit, trigap or a stream file"}),
            ("--out", {"required": True, "metavar": "RUN", "help": "run folder; a stopped run goes on"}),
            ("--method", {"default": "cram", "help": "name of the method (default: cram)"}),
            ("--clip", {"default": None, "help": "folder or name of the CLIP that routes"}),
            ("--config", {"default": [], "nargs": "+", "metavar": "KEY=VALUE", "help": "see CramConfig"}),
            ("--seed", {"default": None, "type": int, "help": "decides all randomness (default: 0)"}),
            ("--gradient-checkpointing", {"action": "store_true", "help": "less memory, slower steps"}),
            *_DATA,
            ("--dtype", _DTYPE),
            ("--device", _DEVICE),
        ),
    ),
    "eval": Command(
        "test the newest state of a run",
        evaluate,
        (
            ("--run", {"required": True, "help": "run folder"}),
            ("--stream", {"default": None, "help": "another stream (default: the tasks the run has learnt)"}),
            *_DATA,
            ("--device", _DEVICE),
        ),
    ),
    "compare": Command(
        "compare methods, seed by seed, on one stream",
        compare,
        (
            (
                "--out",
                {"default": "runs/compare", "help": "folder; a stopped one goes on (default: runs/compare)"},
            ),
            ("--model", {"default": "builtin", "help": "as in train (default: builtin)"}),
            ("--stream", {"default": "builtin", "help": "as in train (default: builtin)"}),
            ("--clip", {"default": None, "help": "as in train"}),
            (
                "--methods",
                {"default": None, "nargs": "*", "metavar": "M", "help": "some of them (default: all)"},
            ),
            (
                "--ablations",
                {"default": None, "nargs": "*", "metavar": "A", "help": "of CRAM; without names all of them"},
            ),
            ("--seeds", {"default": None, "type": int, "metavar": "N", "help": "default: 3, quick 2"}),
            ("--quick", {"action": "store_true", "help": "fewer steps and test samples"}),
            (
                "--jobs",
                {"default": 1, "type": int, "metavar": "N", "help": "runs at once, which share the threads"},
            ),
            ("--config", {"default": [], "nargs": "+", "metavar": "KEY=VALUE", "help": "of all methods"}),
            *_DATA,
            ("--dtype", _DTYPE),
            ("--device", _DEVICE),
        ),
    ),
    "demo": Command(
        "compare CRAM with its bounds on the built-in stream and base",
        demo,
        (
            ("--out", {"default": "runs/demo", "help": "folder (default: runs/demo)"}),
            ("--seeds", {"default": 1, "type": int, "metavar": "N", "help": "number of seeds (default: 1)"}),
            ("--methods", {"default": None, "nargs": "+", "help": "default: cram sequential isolated"}),
            ("--quick", {"action": "store_true", "help": "a few steps on a few samples"}),
            ("--dtype", _DTYPE),
            ("--device", _DEVICE),
        ),
    ),
    "bench": Command(
        "time the expert layer against its baselines (source checkout only)",
        bench,
        (
            ("--quick", {"action": "store_true", "help": "fewer cases, under two minutes"}),
            ("--device", _DEVICE),
            (
                "--out",
                {"default": None, "metavar": "D", "help": "folder (default: by machine)"},
            ),
        ),
    ),
    "info": Command(
        "show the installation, or what a run, a bundle or a model folder holds",
        info,
        (("path", {"nargs": "?", "default": None, "help": "run, bundle or model folder"}),),
    ),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cram", description="Continual learning of multimodal models")
    parser.add_argument("--version", action="version", version=f"cram {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.help, description=command.help)
        for argument, options in command.arguments:
            sub.add_argument(argument, **options)
    return parser


if __name__ == "__main__":
    sys.exit(main())
