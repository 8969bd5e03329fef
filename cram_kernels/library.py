"""The native libraries of `csrc/`: loaded on first use, and why one is missing.

The CPU library holds every schema; the CUDA library adds kernels to it. Both stand beside this file, where
the build of `csrc/build.py` puts them together with a report of what it could not build.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch

from cram_kernels.dispatch import constant_when_compiled

LIBRARIES = {"cpu": "libcram_cpu.so", "cuda": "libcram_cuda.so"}
REPORT = "native.json"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_FOLDER = Path(__file__).parent
_INSTALL = "install torch and a C++ compiler, then cram-mcit again (pip install --no-build-isolation ...)"


def native_missing(device: torch.device | None, dtype: torch.dtype | None) -> str | None:
    """Return why the native kernels cannot serve such tensors; `Missing` for every op that has them.

    Without a device it speaks of the CPU library, which every installation can have.
    """
    if device is not None and device.type not in LIBRARIES:
        return f"tensors must be on a CPU or CUDA device, got {device}"
    if dtype is not None and dtype not in DTYPES:
        return f"dtype must be one of {DTYPES}, got {dtype}"
    return library_missing("cpu" if device is None else device.type)


@constant_when_compiled
def library_missing(name: str) -> str | None:
    """Load the library "cpu" or "cuda"; return why that is not possible, or None."""
    return _load(name, _FOLDER)


def native_libraries() -> dict[str, str | None]:
    """Return library -> None where it loads, else the reason."""
    return {name: library_missing(name) for name in LIBRARIES}


def library_path(name: str) -> Path:
    """Return where a library's file stands, if it is there."""
    return _FOLDER / name


@cache
def _load(name: str, folder: Path) -> str | None:
    if name != "cpu" and (reason := _load("cpu", folder)) is not None:
        return reason
    library = folder / LIBRARIES[name]
    if not library.is_file():
        return f"{LIBRARIES[name]} was not built: {_reason(name, folder)}"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{LIBRARIES[name]} does not load into torch {torch.__version__}: {error}"
    return None


def _reason(name: str, folder: Path) -> str:
    report = folder / REPORT
    if not report.is_file():
        return f"the build hook did not run; {_INSTALL}"
    return str(json.loads(report.read_text(encoding="utf-8"))["missing"].get(name, _INSTALL))
