"""`cram serve --engine vllm`: export a bundle, check vLLM, and start `vllm serve` with everything set."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cram.base import base_folder
from cram.bundle.runs import newest_bundle
from cram.learning.run_folder import run_settings
from cram.loading import BUILTIN, BUILTIN_REAL
from cram.serve.vllm.base import check_checkpoint, published_base
from cram.serve.vllm.export import Adapter, export_groups
from cram.serve.vllm.plugin.seams import check_version, installed_version

ENGINES = ("cram", "vllm")
MIDDLEWARE = "cram.serve.vllm.front.middleware.CramMiddleware"
BASE = "base"
# Greedy where a request says nothing, and nothing from the checkpoint's own settings, as in process.
SAMPLING = ["--generation-config", "vllm", "--override-generation-config", '{"temperature": 0.0}']
# No cache of pictures: vLLM notes a picture before it checks the request. So after a refusal its engine lacks
# the picture, and the next request that has it fails.
PICTURES = ["--mm-processor-cache-gb", "0"]
# The arguments of `cram serve` that mean the same for both engines; vLLM has flags of its own for the others.
SHARED = {"command", "model", "clip", "bundle", "run", "host", "port", "bundles", "dtype", "device"}
SHARED |= {"engine", "export", "no_router", "print", "flags"}


@dataclass(frozen=True)
class Start:
    """How `vllm serve` is started.

    Attributes:
        command: Program and arguments.
        variables: What its environment has beside this one's.
    """

    command: list[str]
    variables: dict[str, str]

    def __str__(self) -> str:
        """One line for a shell."""
        return shlex.join([*(f"{name}={value}" for name, value in self.variables.items()), *self.command])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that choose and start vLLM."""
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default=ENGINES[0],
        help="program that answers: cram in this process, or vLLM (default: cram)",
    )
    text = "with --engine vllm: folder of the exported adapters (default: beside the bundle)"
    parser.add_argument("--export", metavar="DIR", help=text)
    parser.add_argument("--print", action="store_true", help="with --engine vllm: show the command alone")
    text = "with --engine vllm: leave the router to a proxy in front (cram.serve.vllm.front.proxy)"
    parser.add_argument("--no-router", action="store_true", help=text)
    text = "with --engine vllm: what follows `--` goes to `vllm serve`"
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help=text)


def chosen(arguments: argparse.Namespace) -> bool:
    """Whether vLLM answers.

    Raises:
        ValueError: If an option of vLLM comes with the engine in process.
    """
    if arguments.engine == "vllm":
        return True
    given = [name for name in ("export", "no_router", "print", "flags") if getattr(arguments, name)]
    if given:
        option = given[0].replace("_", "-")
        raise ValueError(f"--engine vllm must stand with {option}, got --engine {arguments.engine}")
    return False


def run(arguments: argparse.Namespace, parser_defaults: argparse.Namespace) -> None:
    """Export, then become `vllm serve`, or print the command.

    Args:
        arguments: Those of `cram serve`.
        parser_defaults: The same where nothing is given.

    Raises:
        ValueError: If an option has no meaning for vLLM or without its router, vLLM is of another version,
            the bundle is of another base, or as `export_groups`.
        ModuleNotFoundError: If there is no vLLM.
    """
    for name, default in vars(parser_defaults).items():
        if name not in SHARED and getattr(arguments, name) != default:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{option} must stand without --engine vllm, whose own flags follow `--`, got it"
            )
    if arguments.dtype is not None and _value(arguments.flags, "--dtype") is not None:
        raise ValueError(f"--dtype must be given once, got {arguments.dtype} and another one after `--`")
    for name in ("clip", "device", "bundles"):
        if arguments.no_router and getattr(arguments, name):
            raise ValueError(
                f"--{name} must stand without --no-router, whose server has no use for it, "
                f"got {getattr(arguments, name)!r}"
            )
    model, clip, bundle = sources(arguments)
    out = Path(arguments.export) if arguments.export else bundle.with_name(f"{bundle.name}-vllm")
    served = str(published_base(out).resolve()) if model == BUILTIN else model
    adapters = export_groups(bundle, out)
    start = planned(served, bundle, out, adapters, arguments, clip)
    if arguments.dtype is not None:
        start.command.extend(["--dtype", arguments.dtype])
    program = "" if arguments.print else found_program()
    # A command may also be shown where the base is not.
    if not arguments.print or Path(served).is_dir():
        check_checkpoint(served, bundle, _value(arguments.flags, "--revision"))
    if arguments.print:
        print(start)
        return
    print(f"adapters in {out}\nserving on http://{arguments.host}:{arguments.port}/v1", flush=True)
    os.execve(program, [program, *start.command[1:]], {**os.environ, **start.variables})


def found_program() -> str:
    """Path of the program `vllm`.

    Raises:
        ModuleNotFoundError: If there is no vLLM.
        ValueError: If it is of another version.
    """
    folders = [os.path.dirname(sys.executable), os.environ["PATH"]]
    program = shutil.which("vllm", path=os.pathsep.join(folders))
    if program is None or installed_version() is None:
        raise ModuleNotFoundError("vllm must be installed beside this package, got none")
    check_version(installed_version())
    return program


def sources(arguments: argparse.Namespace) -> tuple[str, str | None, Path]:
    """The base model, or "builtin"; the CLIP that routes, None for the one that the bundle names; the bundle.

    Raises:
        ValueError: If there is neither a bundle with its base nor a run, or vLLM cannot serve the base.
    """
    if arguments.run is not None:
        given = {"model": arguments.model, "clip": arguments.clip}
        settings = run_settings(Path(arguments.run), ("model", "clip"), given)
        bundle = newest_bundle(Path(arguments.run).resolve())[0]
    elif arguments.bundle is not None and arguments.model is not None:
        settings, bundle = {"model": arguments.model, "clip": None}, Path(arguments.bundle).resolve()
    else:
        raise ValueError("--run, or --bundle with --model, must be given for --engine vllm, got neither")
    model, clip = arguments.model or settings["model"], arguments.clip or settings["clip"]
    if BUILTIN_REAL in (clip, model):
        raise ValueError(
            f"model and clip must be such as vLLM knows, got {BUILTIN_REAL}, whose vision tower "
            "is this package's own; leave --engine vllm out"
        )
    if BUILTIN in (clip, model) and clip in (None, BUILTIN):
        clip = str(base_folder() / "clip")
    return model, clip, bundle


def planned(
    model: str,
    bundle: Path,
    out: Path,
    adapters: Sequence[Adapter],
    arguments: argparse.Namespace,
    clip: str | None,
) -> Start:
    """The command that serves exported adapters.

    Raises:
        ValueError: If `$VLLM_PLUGINS` leaves the plugin out.
    """
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "cram" not in allowed.split(","):
        raise ValueError(f"VLLM_PLUGINS must contain cram, got {allowed!r}")
    modules = [f"{adapter.name}={(out / adapter.name).resolve()}" for adapter in adapters]
    flags, more = _split(arguments.flags)
    command = ["vllm", "serve", model, "--served-model-name", BASE]
    command += ["--host", arguments.host, "--port", str(arguments.port), "--enable-lora"]
    command += ["--max-lora-rank", str(max(adapter.group.slot for adapter in adapters))]
    slots = len(adapters) + len(more)
    # Room in memory for a bundle that replaces this one while requests of this one are answered.
    command += ["--max-loras", str(slots), "--max-cpu-loras", str(2 * slots + 2)]
    router = [] if arguments.no_router else ["--middleware", MIDDLEWARE]
    command += [*SAMPLING, *PICTURES, *router, *flags, "--lora-modules", *modules, *more]
    if arguments.no_router:
        return Start(command, {})
    variables = {"CRAM_BUNDLE": str(bundle.resolve()), "CRAM_EXPORT": str(out.resolve())}
    optional = {"CRAM_CLIP": clip, "CRAM_BUNDLES": arguments.bundles, "CRAM_DEVICE": arguments.device}
    return Start(command, variables | {name: str(value) for name, value in optional.items() if value})


def _value(flags: Sequence[str], option: str) -> str | None:
    """The last value of an option among flags, or None."""
    found = None
    for place, flag in enumerate(flags):
        name, equals, value = flag.partition("=")
        if name == option:
            found = value if equals else " ".join(flags[place + 1 : place + 2])
    return found


def _split(flags: Sequence[str]) -> tuple[list[str], list[str]]:
    """Flags without `--lora-modules`, and its values: vLLM takes the last such flag alone."""
    kept: list[str] = []
    modules: list[str] = []
    taken = False
    for flag in flags:
        if flag == "--lora-modules":
            taken = True
        elif taken and not flag.startswith("--"):
            modules.append(flag)
        else:
            taken = False
            kept.append(flag)
    return kept, modules
