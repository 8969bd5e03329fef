"""Compiles CPU kernels that take a given instruction set, whatever the CPU of the test has."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from csrc import build

AVX512 = '__builtin_cpu_supports("avx512f")'
ANY = "__builtin_cpu_supports("


def require_target(target: str) -> None:
    """Skip the calling test where kernels of the instruction set cannot be compiled or cannot run.

    A CPU without AVX-512 runs that code too: the compiler splits wide vectors where it is told to.
    """
    if platform.machine() != "x86_64":
        pytest.skip("other architectures have one instruction set")
    try:
        build.find_compiler()
    except build.Unavailable as reason:
        pytest.skip(str(reason))
    if target != "baseline" and "AVX" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("the CPU has no AVX2")


def narrowed_library(
    folder: Path, name: str, beliefs: Mapping[str, str], files: Sequence[str], *flags: str
) -> Path:
    """Compile sources with pieces of their text replaced; the operations are those of `torch.ops.<name>`.

    Args:
        folder: Where the changed sources and the library go.
        name: Namespace of the operations.
        beliefs: Pieces of the sources, each of which must be there -> what stands there instead.
        files: Sources to compile, relative to csrc/; `ops.cpp` is compiled with them.
        flags: Further flags of the compiler.
    """
    missed = set(beliefs)
    for path in build.sources(".h", ".cpp"):
        text = path.read_text(encoding="utf-8").replace("(cram, ", f"({name}, ")
        for old, new in beliefs.items():
            missed -= {old} if old in text else set()
            text = text.replace(old, new)
        target = folder / path.relative_to(build.HERE)
        target.parent.mkdir(exist_ok=True)
        target.write_text(text, encoding="utf-8")
    assert not missed
    torch_root, library = build.torch_folder(), folder / f"{name}.so"
    command = [build.find_compiler(), *build.CXX_FLAGS, "-w", *flags, *build.DEFINES]
    sources = [str(folder / file) for file in ("ops.cpp", *files)]
    link = [f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-o", str(library)]
    subprocess.run([*command, f"-I{torch_root / 'include'}", "-shared", *sources, *link], check=True)
    return library
