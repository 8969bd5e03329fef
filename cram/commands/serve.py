"""`cram serve`: answer questions over HTTP and in the browser, with the experts of a bundle."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cram.bundle.bundle import load
from cram.bundle.runs import newest_bundle
from cram.commands.options import CLIP_HELP, MODEL_HELP, add_device
from cram.compare.comparison import SMALL_BASE
from cram.config import CramConfig
from cram.learning.learner import ContinualLearner
from cram.learning.run_folder import run_settings
from cram.loading import BUILTIN, Sources
from cram.serve.vllm import command as vllm
from cram.streams import load_stream

if TYPE_CHECKING:
    from cram.serve.bundles import Watch

TOKEN = "CRAM_ADMIN_TOKEN"
FIRST_RUN = Path("runs/serve")
MAX_DRAIN = 86_400
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Served(NamedTuple):
    """What is served at start.

    Attributes:
        model: The attached model.
        processor: Its processor.
        bundle: Where its experts come from.
        builtin: Whether the base is the built-in one.
        watched: Finds bundles that come later; it has begun before the bundle was chosen. None without.
    """

    model: Any
    processor: Any
    bundle: Path
    builtin: bool
    watched: Watch | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--model", help=f"{MODEL_HELP} (default: the run's, else builtin)")
    parser.add_argument("--clip", help=CLIP_HELP)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--bundle", metavar="B", help="folder of the bundle that is served; its base is --model"
    )
    text = f"folder of a run, whose newest bundle is served (default: {FIRST_RUN}, learnt on first use)"
    which.add_argument("--run", metavar="RUN", help=text)
    parser.add_argument("--host", default="127.0.0.1", help="address (default: 127.0.0.1)")
    parser.add_argument("--port", default=8000, type=int, help="port (default: 8000)")
    text = f"folder of bundles that clients with ${TOKEN} may load; a restart serves the last one again"
    parser.add_argument("--bundles", metavar="DIR", help=text)
    text = "load each bundle that appears in --bundles, or in the run"
    parser.add_argument("--watch", action="store_true", help=text)
    parser.add_argument("--rows", default=32, type=int, help="most answers in flight (default: 32)")
    parser.add_argument("--queue", default=128, type=int, help="most requests that wait (default: 128)")
    text = "most tokens of an answer (default: 1024)"
    parser.add_argument("--max-tokens", default=1024, type=int, help=text)
    parser.add_argument(
        "--context", type=int, help="most tokens of prompt and answer together (default: the model's)"
    )
    text = "about how many tokens of a prompt are read between two steps (default: 96 on a CPU, else 512)"
    parser.add_argument("--piece", type=int, help=text)
    floor = "gates below this are set to 0, so that fewer experts are computed (default: 0 changes none)"
    parser.add_argument("--gate-floor", default=0.0, type=float, help=floor)
    parser.add_argument(
        "--drain",
        default=30.0,
        type=float,
        help="most seconds that a stop waits for answers in flight (default: 30)",
    )
    text = "float32, bfloat16 or float16 of the base (default: float32; the checkpoint's with --engine vllm)"
    parser.add_argument("--dtype", help=text)
    add_device(parser)
    vllm.add_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Load the model, and serve until a signal ends it."""
    if vllm.chosen(arguments):
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        vllm.run(arguments, parser.parse_args([]))
        return
    for name in ("starlette", "uvicorn"):
        if find_spec(name) is None:
            raise ModuleNotFoundError(
                f"{name} must be installed (`pip install '.[hf,serve]'` in this package's folder), got none"
            )
    for option in ("rows", "queue", "max_tokens", "piece"):
        given = getattr(arguments, option)
        if given is not None and given < 1:
            raise ValueError(f"{option} must be at least 1, got {given}")
    if not 0 <= arguments.drain <= MAX_DRAIN:
        raise ValueError(f"drain must be in [0, {MAX_DRAIN}], got {arguments.drain}")
    look = watched_bundles(arguments)
    with bound(arguments.host, arguments.port) as place:
        served = load_served(arguments, look)
        server = web_server_of(arguments, served)
        experts, url = ", ".join(served.model.cram.expert_names) or "none", url_of(place)
        print(f"experts: {experts}\npage: {url}/\nAPI: {url}/v1", flush=True)
        # After an interrupt uvicorn has shut down in order and raises it again.
        with suppress(KeyboardInterrupt):
            server.run(sockets=[place])


def web_server_of(arguments: argparse.Namespace, served: Served) -> Any:
    """The web server over an engine with the command's limits."""
    from cram.serve.bundles import Bundles
    from cram.serve.engine.engine import Engine
    from cram.serve.engine.limits import Limits
    from cram.serve.http.app import create_app
    from cram.serve.http.body import Settings
    from cram.serve.http.connection import web_server

    piece = arguments.piece or (Limits.piece if served.model.device.type == "cpu" else 512)
    sizes = (arguments.rows, arguments.queue, arguments.max_tokens, arguments.context, piece)
    engine = Engine(served.model, served.processor, Limits(*sizes), arguments.gate_floor)
    settings = Settings(
        admin_token=os.environ.get(TOKEN) or None,
        hosts=LOOPBACK if arguments.host in LOOPBACK else (),
    )
    root = None if arguments.bundles is None else Path(arguments.bundles)
    bundles = Bundles(engine, served.model, root, served.watched, served.bundle)
    offered = examples() if served.builtin else ()
    app = create_app(engine, served.processor, settings, bundles, offered)
    return web_server(app, partial(engine.stop, 0), arguments.drain)


def bound(host: str, port: int) -> socket.socket:
    """A socket with the address, so that a port in use is told before a model is loaded.

    Raises:
        ValueError: If the address is none of this machine's, or in use.
    """
    place = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        place.bind((host, port))
    except (OSError, OverflowError) as error:
        place.close()
        raise ValueError(f"--host and --port must be free to listen on, got {host}:{port}: {error}") from None
    return place


def url_of(place: socket.socket) -> str:
    """The address of a socket as a browser takes it."""
    host, port = place.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def watched_bundles(arguments: argparse.Namespace) -> Callable[[], list[Any]] | None:
    """Lists the bundles that `--watch` follows; None without it.

    Raises:
        ValueError: If there is neither a bundle folder nor a run to follow.
    """
    from cram.serve.bundles import newest_of_run, stamps

    if not arguments.watch:
        return None
    if arguments.bundles is not None:
        return partial(stamps, Path(arguments.bundles))
    if arguments.bundle is not None:
        raise ValueError("--watch must have --bundles or a run to follow, got --bundle alone")
    return partial(newest_of_run, Path(arguments.run or FIRST_RUN))


def load_served(arguments: argparse.Namespace, look: Callable[[], list[Any]] | None = None) -> Served:
    """The model with its experts.

    Args:
        arguments: Those of the command.
        look: See `watched_bundles`.

    Raises:
        ValueError: If a base other than the built-in one has no bundle, or no bundle fits it.
    """
    from cram.serve.bundles import Watch, bundles_at_start

    if arguments.bundle is None and arguments.run is None and arguments.bundles is None:
        if arguments.model not in (None, BUILTIN):
            raise ValueError(f"--bundle or --run must be given for {arguments.model!r}, got neither")
        learn_first(FIRST_RUN, arguments.device)
        arguments.run = FIRST_RUN
    watched = None if look is None else Watch(look)
    found = [] if watched is None else watched.first
    settings: dict[str, Any] = {"model": BUILTIN, "clip": None}
    given = None if arguments.bundle is None else Path(arguments.bundle)
    if arguments.run is not None:
        chosen = {"model": arguments.model, "clip": arguments.clip}
        settings = run_settings(Path(arguments.run), ("model", "clip"), chosen)
        given = newest_bundle(Path(arguments.run))[0]
    candidates = [given] if given is not None else []
    if arguments.bundles is not None:
        candidates = bundles_at_start(Path(arguments.bundles), given, None if watched is None else found)
    elif found:
        candidates = [found[0].folder]
    if not candidates:
        raise ValueError(f"{arguments.bundles} must hold a bundle, got none")
    base = arguments.model or settings["model"]
    sources = Sources(base, arguments.clip or settings["clip"], arguments.dtype or "float32")
    model, processor, encoder = sources.load(arguments.device)
    bundle = _load_first(model, candidates, encoder, processor)
    if watched is not None:
        refused = candidates[: candidates.index(bundle)]
        watched.refuse(stamp for stamp in found if stamp.folder in refused)
    return Served(model.eval(), processor, bundle, base == BUILTIN, watched)


def _load_first(model: Any, candidates: list[Path], encoder: Any, processor: Any) -> Path:
    """Load the first bundle that is not refused; the refusal of the last one is raised."""
    for bundle in candidates[:-1]:
        try:
            load(model, bundle, encoder, processor)
            return bundle
        except (ValueError, OSError) as error:
            print(f"{bundle.name} is not served: {error}", flush=True)
    load(model, candidates[-1], encoder, processor)
    return candidates[-1]


def examples() -> list[Any]:
    """One question of each built-in task, for the page."""
    from cram.serve.http.page import Example

    tasks = load_stream(BUILTIN, limit=1).tasks
    samples = [(task.name, task.test[0]) for task in tasks]
    return [
        Example(name, sample.instruction, sample.images[0])
        for name, sample in samples
        if sample.images and not isinstance(sample.images[0], Path)
    ]


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
