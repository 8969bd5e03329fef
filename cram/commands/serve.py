"""`cram serve`: answer questions over HTTP, with the experts of a bundle."""

from __future__ import annotations

import argparse
import os
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cram.bundle.bundle import load
from cram.bundle.runs import newest_bundle, read_run
from cram.commands.options import add_device, add_dtype
from cram.compare.comparison import SMALL_BASE
from cram.config import CramConfig
from cram.learning.learner import ContinualLearner
from cram.loading import BUILTIN, Sources
from cram.streams import load_stream

TOKEN = "CRAM_ADMIN_TOKEN"
FIRST_RUN = Path("runs/serve")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--model", help="folder or name of the base (default: the run's, or builtin)")
    parser.add_argument("--clip", help="folder or name of the CLIP that routes")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--bundle", metavar="B", help="folder of the bundle")
    text = f"folder of a run, whose newest bundle is served (default: {FIRST_RUN}, learnt on first use)"
    which.add_argument("--run", metavar="RUN", help=text)
    parser.add_argument("--host", default="127.0.0.1", help="address (default: 127.0.0.1)")
    parser.add_argument("--port", default=8000, type=int, help="port (default: 8000)")
    text = f"folder of bundles that clients with ${TOKEN} may load"
    parser.add_argument("--bundles", metavar="DIR", help=text)
    parser.add_argument("--rows", default=32, type=int, help="answers in flight at most (default: 32)")
    parser.add_argument("--queue", default=128, type=int, help="requests that wait at most (default: 128)")
    parser.add_argument("--max-tokens", default=1024, type=int, help="of an answer at most (default: 1024)")
    parser.add_argument("--context", type=int, help="tokens of prompt and answer (default: the model's)")
    parser.add_argument("--gate-floor", default=0.0, type=float, help="drop smaller gates (default: 0, none)")
    parser.add_argument("--drain", default=30.0, type=float, help="seconds that a stop waits (default: 30)")
    add_dtype(parser)
    add_device(parser)


def run(arguments: argparse.Namespace) -> None:
    """Load the model, and serve until a signal ends it."""
    for name in ("starlette", "uvicorn"):
        if find_spec(name) is None:
            raise ModuleNotFoundError(
                f"{name} must be installed (`pip install 'cram-mcit[hf,serve]'`), got none"
            )
    import uvicorn

    from cram.serve.app import Settings, create_app
    from cram.serve.engine import Engine, Limits

    for option in ("rows", "queue", "max_tokens"):
        if getattr(arguments, option) < 1:
            raise ValueError(f"{option} must be at least 1, got {getattr(arguments, option)}")
    model, processor = load_served(arguments)
    limits = Limits(arguments.rows, arguments.queue, arguments.max_tokens, arguments.context)
    engine = Engine(model, processor, limits, arguments.gate_floor)
    settings = Settings(
        drain_s=arguments.drain,
        admin_token=os.environ.get(TOKEN) or None,
        bundles=None if arguments.bundles is None else Path(arguments.bundles),
    )
    app = create_app(engine, model, processor, settings)
    experts = ", ".join(model.cram.expert_names) or "none"
    print(f"experts: {experts}\nserving on http://{arguments.host}:{arguments.port}/v1", flush=True)
    # After an interrupt uvicorn has shut down in order and raises it again.
    with suppress(KeyboardInterrupt):
        uvicorn.run(
            app,
            host=arguments.host,
            port=arguments.port,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=max(1, round(arguments.drain)),
        )


def load_served(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The model with its experts, and its processor.

    Raises:
        ValueError: If a base other than the built-in one has no bundle, or the bundle does not fit it.
    """
    if arguments.bundle is None and arguments.run is None:
        if arguments.model not in (None, BUILTIN):
            raise ValueError(f"--bundle or --run must be given for {arguments.model!r}, got neither")
        learn_first(FIRST_RUN, arguments.device)
    run = None if arguments.bundle is not None else Path(arguments.run or FIRST_RUN)
    settings: dict[str, Any] = {"model": BUILTIN, "clip": None} if run is None else read_run(run)["settings"]
    bundle = Path(arguments.bundle) if run is None else newest_bundle(run)[0]
    sources = Sources(
        arguments.model or settings["model"], arguments.clip or settings["clip"], arguments.dtype
    )
    model, processor, encoder = sources.load(arguments.device)
    load(model, bundle, encoder, processor)
    return model.eval(), processor


def learn_first(out: Path, device: str | None, limit: int | None = None, **config: Any) -> None:
    """Learn the built-in stream on the built-in base, unless the run has ended before.

    Args:
        out: The run folder; a stopped run goes on.
        device: See `cram.loading.load_model`.
        limit: Samples a split at most.
        config: Fields of the configuration that differ from those of `cram demo`.
    """
    sources = Sources(BUILTIN)
    settings: dict[str, Any] = {"model": BUILTIN, "clip": None, "dtype": sources.dtype, "stream": BUILTIN}
    settings |= {"limit": limit, "data_root": None}
    chosen = CramConfig.from_dict({**SMALL_BASE, **config})
    stream = load_stream(BUILTIN, chosen.seed, limit, None)
    if (out / "report.json").is_file() and len(newest_bundle(out)[1]) == len(stream.tasks):
        return
    print(f"learning the built-in tasks in {out}, once", flush=True)
    model, processor, encoder = sources.load(device)
    ContinualLearner(model, processor, stream, chosen, out=out, encoder=encoder, settings=settings).run()
