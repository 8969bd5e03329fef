"""`cram eval`: test the newest state of a run, by default on the tasks that it has learnt."""

from __future__ import annotations

import argparse
from pathlib import Path

from cram.bundle.runs import newest_bundle, read_run
from cram.commands.options import add_data, add_device, check_data_root
from cram.config import read_config
from cram.learning.answers.evaluate import evaluate_run
from cram.learning.parallel.processes import joined, own_device
from cram.learning.run_folder import BASE_SETTINGS, SETTINGS, run_settings
from cram.loading import Sources
from cram.streams import Stream, load_stream

MEND = "give a run of `cram train`"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("folder", nargs="?", metavar="RUN", help="run folder")
    # torchrun takes this option for one of its own; the position does without it.
    parser.add_argument("--run", help="run folder, in place of the position")
    text = (
        "another stream, without the limit, the data root and the order of the run "
        "(default: the tasks the run has learnt)"
    )
    parser.add_argument("--stream", help=text)
    add_data(parser)
    add_device(parser)


def run(arguments: argparse.Namespace) -> None:
    """Test, and write predictions and accuracies into the run folder."""
    if (arguments.run is None) == (arguments.folder is None):
        raise ValueError("the run folder must be given, once, got " + ("both" if arguments.run else "none"))
    folder = Path(arguments.run or arguments.folder)
    record = read_run(folder)
    _, learnt = newest_bundle(folder)
    seed = read_config(record["identity"]["config"]).seed
    if arguments.stream is None:
        given = {name: getattr(arguments, name) for name in ("limit", "data_root")}
        settings = run_settings(folder, SETTINGS, given, MEND)
        check_data_root(settings["stream"], arguments.data_root)
        stream = load_stream(settings["stream"], seed, settings["limit"], settings["data_root"])
        tasks = stream.in_order(settings["order"]).tasks
        stream = Stream(stream.name, tuple(task for task in tasks if task.name in learnt))
    else:
        settings = run_settings(folder, BASE_SETTINGS, {}, MEND)
        check_data_root(arguments.stream, arguments.data_root)
        stream = load_stream(arguments.stream, seed, arguments.limit, arguments.data_root)
    sources = Sources(settings["model"], settings["clip"], settings["dtype"])
    with joined(arguments.device):
        evaluate_run(folder, stream, *sources.load(own_device(arguments.device)))
