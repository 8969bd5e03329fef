"""`cram train`: learn a stream of tasks, one after another."""

from __future__ import annotations

import argparse
from pathlib import Path

from cram.atomic import write_json
from cram.commands.options import add_data, add_device, add_dtype, parse_config, refuse_several_processes
from cram.compare.base_row import measure_base
from cram.learning.learner import ContinualLearner
from cram.loading import Sources
from cram.methods import METHODS
from cram.report.examples import BASE, gather_examples
from cram.report.page import write_page
from cram.streams import load_stream


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--model", required=True, help="folder or name of the base model, or builtin")
    parser.add_argument("--stream", required=True, help="builtin, ucit, trigap or a stream file")
    parser.add_argument("--out", required=True, metavar="RUN", help="run folder; a stopped run goes on")
    parser.add_argument("--method", help="name of the method (default: cram)")
    parser.add_argument("--clip", help="folder or name of the CLIP that routes")
    parser.add_argument("--config", default=[], nargs="+", metavar="KEY=VALUE", help="see CramConfig")
    parser.add_argument("--seed", type=int, help="decides all randomness (default: 0)")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, slower steps")
    add_data(parser)
    add_dtype(parser)
    add_device(parser)


def run(arguments: argparse.Namespace) -> None:
    """Train, test after every task, and write the report."""
    refuse_several_processes("train")
    if arguments.method not in (None, *METHODS):
        raise ValueError(f"method must be one of {sorted(METHODS)}, got {arguments.method!r}")
    checkpointing = True if arguments.gradient_checkpointing else None
    options = {
        "method": arguments.method,
        "seed": arguments.seed,
        "gradient_checkpointing": checkpointing,
    }
    config = parse_config(arguments.config, arguments.stream, options)
    stream = load_stream(arguments.stream, config.seed, arguments.limit, arguments.data_root)
    names = ("model", "clip", "dtype", "stream", "limit", "data_root")
    settings = {name: getattr(arguments, name) for name in names}
    model, processor, encoder = Sources(arguments.model, arguments.clip, arguments.dtype).load(
        arguments.device
    )
    out = Path(arguments.out)
    learner = ContinualLearner(model, processor, stream, config, out=out, encoder=encoder, settings=settings)
    report = learner.run()
    report["base"] = measure_base(learner, out / BASE, shown=True)
    write_json(out / "report.json", report)
    print(f"report: {write_page(out, gather_examples(out, stream))}")
