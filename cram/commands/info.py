"""`cram info`: the installation, or what a run, a bundle or a model folder holds."""

from __future__ import annotations

import argparse
import math
import platform
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from cram import __version__
from cram.bundle.format import MANIFEST, Description, read_description
from cram.bundle.runs import RUN, newest_bundle, read_run
from cram.families import FAMILIES, family_of, match_linears
from cram_kernels import available_impls, crossovers, native_libraries

# The library is compiled against the torch of the interpreter that installs, so isolation must be off.
MEND = (
    "install a C++ compiler (g++), torch first, then this package from its folder: "
    "pip install --no-build-isolation --no-deps --force-reinstall ."
)
PACKAGES = ("torch", "triton", "transformers", "peft", "safetensors", "numpy", "pillow")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("path", nargs="?", help="run, bundle or model folder")


def run(arguments: argparse.Namespace) -> None:
    """Print what is there."""
    print("\n".join(installation() if arguments.path is None else describe_path(Path(arguments.path))))


def installation() -> list[str]:
    """Versions, devices, and each op's implementations with the reason where one is missing."""
    from cram.methods import METHODS

    lines = [f"cram {__version__}, Python {platform.python_version()} on {platform.machine()}"]
    lines.append("packages: " + ", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines.append(
        f"devices: cpu ({torch.get_num_threads()} threads)" + "".join(f", {name}" for name in devices)
    )
    lines.append(f"families: {', '.join(sorted(FAMILIES))}")
    lines.append(f"methods: {', '.join(METHODS)}")
    libraries = native_libraries()
    lines += [f"native library for {n}: {reason or 'loaded'}" for n, reason in libraries.items()]
    if libraries["cpu"] is not None:
        lines.append(f"to mend it: {MEND}")
    lines += _crossovers()
    lines.append("implementations:")
    for op, impls in available_impls().items():
        lines.append(f"  {op}: {', '.join(name for name, reason in impls.items() if reason is None)}")
        lines += [f"    no {name}: {reason}" for name, reason in impls.items() if reason is not None]
    return lines


def _crossovers() -> list[str]:
    """Which products the native CPU layer computes itself, and why not with tiles."""
    found = crossovers()
    if found is None:
        return []
    row, reason = found
    return [f"native products on the CPU: {row}" + (f" (no tiles: {reason})" if reason else "")]


def describe_path(path: Path) -> list[str]:
    """What a folder holds.

    Raises:
        ValueError: If it is none of a run, a bundle and a model folder, or is damaged.
    """
    for file, describe in ((RUN, describe_run), (MANIFEST, describe_bundle), ("config.json", describe_model)):
        if (path / file).is_file():
            return describe(path)
    names = f"{RUN}, {MANIFEST} or config.json"
    raise ValueError(f"{path} must be a run, a bundle or a model folder with {names}, got none of them")


def describe_run(path: Path) -> list[str]:
    """Method, stream and learnt tasks of a run, and its newest bundle."""
    identity = read_run(path)["identity"]
    bundle, learnt = newest_bundle(path)
    names = identity["stream"]["tasks"]
    return [
        f"run of {identity['method']} on {identity['stream']['name']} ({', '.join(names)})",
        f"learnt tasks: {len(learnt)} of {len(names)}",
        *describe_bundle(bundle),
    ]


def describe_bundle(path: Path) -> list[str]:
    """Experts of a bundle with groups, ranks and parameters; every file is checked."""
    description = read_description(path)
    sizes = {name: d_in + d_out for name, (d_in, d_out) in description.modules.items()}
    lines = [
        f"bundle {path}",
        f"  method {description.config.method}, family {description.family}, "
        f"{len(sizes)} linears in {description.num_layers} layers",
    ]
    groups = instruction_groups(description)
    if groups:
        lines.append(f"  {len(set(groups.values()))} instruction groups with experts")
    total = 0
    for expert in description.experts:
        parameters = sum(rank * sizes[name] for name, rank in expert.ranks.items())
        total += parameters
        ranks = ", ".join(
            f"{rank} x {count}" for rank, count in sorted(Counter(expert.ranks.values()).items())
        )
        group = f"group {groups[expert.name]}, " if expert.name in groups else ""
        lines.append(f"  {expert.name}: {group}ranks {ranks}, {parameters:,} parameters")
    lines.append(f"  {len(description.experts)} experts, {total:,} parameters")
    if description.tensors:
        values = sum(math.prod(shape) for shape in description.tensors.values())
        lines.append(f"  {len(description.tensors)} tensors of the method, {values:,} values")
    return lines


def instruction_groups(description: Description) -> dict[str, int]:
    """Expert -> instruction group, in a bundle of CRAM."""
    if description.config.method != "cram":
        return {}
    return {expert: group for expert, group in description.values["experts"]}


def describe_model(path: Path) -> list[str]:
    """Family of a model folder and the linears that experts would act on; no weight is read.

    Raises:
        ValueError: If the family is not known.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    from cram.config import CramConfig
    from cram.loading import model_type

    model_type(path)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(str(path)))
    projections = CramConfig().target_projections
    return [f"model {path}", f"  {match_linears(model, family_of(model), projections)}"]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"
