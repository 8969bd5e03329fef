"""`cram compare`: methods and ablations, seed by seed, on one stream."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cram.commands.options import (
    CLIP_HELP,
    CONFIG_HELP,
    MODEL_HELP,
    STREAM_HELP,
    add_data,
    add_device,
    add_dtype,
    check_data_root,
    parse_config,
    refuse_several_processes,
)
from cram.compare.board import run_comparison
from cram.compare.comparison import (
    FULL_SEEDS,
    QUICK,
    QUICK_SEEDS,
    QUICK_TESTS,
    SETTINGS,
    Comparison,
)
from cram.compare.entries import ABLATIONS, entries
from cram.compare.merged import merge_files
from cram.compare.search import read_found, search
from cram.loading import Sources
from cram.methods import METHODS
from cram.report.examples import Example, gather_examples
from cram.report.page import write_page
from cram.report.schema import Report
from cram.report.table import print_table, write_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    out = "folder; a stopped comparison goes on (default: runs/compare)"
    parser.add_argument("--out", default="runs/compare", help=out)
    parser.add_argument("--model", default="builtin", help=f"{MODEL_HELP} (default: builtin)")
    text = f"{STREAM_HELP} (default: builtin)"
    parser.add_argument("--stream", default="builtin", help=text)
    parser.add_argument("--clip", help=CLIP_HELP)
    text = f"methods to compare, among {', '.join(METHODS)} (default: all)"
    parser.add_argument("--methods", nargs="*", metavar="M", help=text)
    text = f"also CRAM without one of its ideas: {', '.join(ABLATIONS)} (without names: all of them)"
    parser.add_argument("--ablations", nargs="*", metavar="A", help=text)
    parser.add_argument("--seeds", type=int, metavar="N", help="number of seeds (default: 3; with --quick 2)")
    text = "number of the first seed (default: 0); several machines can each take other seeds"
    parser.add_argument("--first-seed", default=0, type=int, metavar="S", help=text)
    text = "run nothing: join the report.json of comparisons with other seeds or methods"
    parser.add_argument("--merge", nargs="+", default=[], metavar="REPORT", help=text)
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK['max_steps']} steps and {QUICK_TESTS} test samples per task",
    )
    text = "number of orders of the tasks: seed S learns them in order S mod N (default: 1, the stream's own)"
    parser.add_argument("--orders", default=1, type=int, metavar="N", help=text)
    text = "first find each method's learning rate and ranks on a seed that is in no result"
    parser.add_argument("--search", action="store_true", help=text)
    text = "search.json of an earlier --search, whose settings are taken"
    parser.add_argument("--found", metavar="FILE", help=text)
    jobs = "number of runs side by side, which share the threads (default: 1)"
    parser.add_argument("--jobs", default=1, type=int, metavar="N", help=jobs)
    parser.add_argument(
        "--config", default=[], nargs="+", metavar="KEY=VALUE", help=f"for all methods: {CONFIG_HELP}"
    )
    add_data(parser)
    add_dtype(parser)
    add_device(parser)


def run(arguments: argparse.Namespace) -> None:
    """Run what is not done yet, or join reports; print the table, write table and page."""
    refuse_several_processes("compare")
    check_given(arguments)
    if arguments.merge:
        _show(Path(arguments.out), merge_files(arguments.merge, Path(arguments.out)), [])
        return
    quick = arguments.quick
    defaults = {**SETTINGS.get(arguments.model, {}), **(QUICK if quick else {})}
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
        orders=arguments.orders,
        first_seed=arguments.first_seed,
    )
    if arguments.found and arguments.search:
        raise ValueError("found must come from a file or from a search, got --found and --search")
    if arguments.found:
        found = read_found(Path(arguments.found), comparison.all_seeds)
        comparison = replace(comparison, found=found)
    if arguments.search:
        comparison = replace(comparison, found=search(comparison, arguments.jobs))
    report = run_comparison(comparison, arguments.jobs)
    _show(out, report, gather_examples(out, comparison.load_stream(comparison.first_seed)))


def check_given(arguments: argparse.Namespace) -> None:
    """Refuse options that would change nothing.

    Raises:
        ValueError: If an option of a comparison comes with `--merge`, `--config` has a field that every run
            sets, or a built-in stream comes with a folder of data.
    """
    if arguments.merge:
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        for name, default in vars(parser.parse_args([])).items():
            if name not in ("merge", "out") and (given := getattr(arguments, name)) != default:
                option = f"--{name.replace('_', '-')}"
                raise ValueError(f"{option} must stand without --merge, which runs nothing, got {given!r}")
    for pair in arguments.config:
        if pair.partition("=")[0] in ("method", "seed"):
            raise ValueError(
                f"--config must leave method and seed to --methods, --seeds and --first-seed, got {pair!r}"
            )
    check_data_root(arguments.stream, arguments.data_root)


def _show(out: Path, report: Report, examples: Sequence[Example]) -> None:
    print_table(report)
    print(f"table: {write_table(out, report)}")
    print(f"report: {write_page(out, examples)}")
