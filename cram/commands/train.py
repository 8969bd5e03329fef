"""`cram train`: learn a stream of tasks, one after another; in several processes under a launcher."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cram.atomic import write_json
from cram.commands.options import (
    CLIP_HELP,
    CONFIG_HELP,
    MODEL_HELP,
    STREAM_HELP,
    add_data,
    add_device,
    add_dtype,
    add_order,
    check_data_root,
    parse_config,
)
from cram.compare.base_row import measure_base
from cram.learning.learner import CHECKPOINT_EVERY, ContinualLearner, Work
from cram.learning.parallel.processes import by_first, joined, own_device
from cram.loading import BUILTIN, Sources
from cram.methods import METHODS
from cram.report.examples import BASE, gather_examples
from cram.report.page import write_page
from cram.report.schema import Report
from cram.streams import Stream, load_stream
from cram.streams.registry import BUILTIN as STREAMS
from cram.streams.registry import SHIPPED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    parser.add_argument("--stream", required=True, help=STREAM_HELP)
    parser.add_argument("--out", required=True, metavar="RUN", help="run folder; a stopped run goes on")
    parser.add_argument("--method", help=f"one of {', '.join(METHODS)} (default: cram)")
    parser.add_argument("--clip", help=CLIP_HELP)
    parser.add_argument("--config", default=[], nargs="+", metavar="KEY=VALUE", help=CONFIG_HELP)
    parser.add_argument("--seed", type=int, help="decides all randomness (default: 0)")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, slower steps")
    text = "forwards per step and process (gradient accumulation): less memory, the same samples per step"
    parser.add_argument("--forwards", default=1, type=int, metavar="N", help=text)
    text = f"steps between two checkpoints within a task; 0 for none (default: {CHECKPOINT_EVERY})"
    parser.add_argument("--checkpoint-every", default=CHECKPOINT_EVERY, type=int, metavar="N", help=text)
    text = "divide the base's weights between the processes (FSDP2), where it is too large for one GPU"
    parser.add_argument("--shard", action="store_true", help=text)
    add_data(parser)
    add_order(parser)
    add_dtype(parser)
    add_device(parser)


def run(arguments: argparse.Namespace) -> None:
    """Train, test after every task, and write the report."""
    if arguments.method not in (None, *METHODS):
        raise ValueError(f"method must be one of {sorted(METHODS)}, got {arguments.method!r}")
    check_data_root(arguments.stream, arguments.data_root)
    checkpointing = True if arguments.gradient_checkpointing else None
    options = {
        "method": arguments.method,
        "seed": arguments.seed,
        "gradient_checkpointing": checkpointing,
    }
    config = parse_config(arguments.config, arguments.stream, options)
    stream = load_stream(arguments.stream, config.seed, arguments.limit, arguments.data_root)
    stream = stream.in_order(arguments.order)
    names = ("model", "clip", "dtype", "stream", "limit", "data_root", "order")
    settings = {name: _anywhere(getattr(arguments, name)) for name in names}
    work = Work(arguments.forwards, arguments.checkpoint_every, arguments.shard)
    out = Path(arguments.out)
    with joined(arguments.device):
        sources = Sources(arguments.model, arguments.clip, arguments.dtype)
        model, processor, encoder = sources.load(own_device(arguments.device))
        learner = ContinualLearner(
            model,
            processor,
            stream,
            config,
            out=out,
            encoder=encoder,
            settings=settings,
            work=work,
        )
        report = learner.run()
        base = measure_base(learner, out / BASE, shown=True)
        by_first(lambda: _publish({**report, "base": base}, learner.stream, out))


def _anywhere(value: Any) -> Any:
    """A setting that later commands can use in any working directory: an existing path becomes absolute."""
    named = not isinstance(value, str) or value in (BUILTIN, *STREAMS, *SHIPPED)
    return value if named or not Path(value).exists() else str(Path(value).absolute())


def _publish(report: Report, stream: Stream, out: Path) -> None:
    """Write the report with the base's row, and the page."""
    write_json(out / "report.json", report)
    print(f"report: {write_page(out, gather_examples(out, stream))}")
