"""Compiles Triton kernels without a GPU, into the cache in which a launch on a GPU looks them up.

Triton's whole path runs, under a driver that names an architecture, loads nothing and launches nothing. So a
kernel that an operation compiles here is the one that the same operation finds there: same source, signature,
constants and options. The cache must lie in a folder of the same absolute path on both machines, and both
must have the same build of Triton. Tensors are on the "meta" device, which has sizes and no memory.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from benchmarks.ours import OPS
from cram_kernels.dispatch import interpreted

META = torch.device("meta")
HOPPER = 90
SHARED_BYTES = 227 * 1024  # of a program on sm_90; Triton refuses a kernel that asks for more
WARP, MOST_THREADS = 32, 1024
STUB = "libcuda.so.1"


class NullDriver:
    """Names an architecture to Triton; loads no kernel and launches none.

    Attributes:
        compiled: Names of the kernels in the order in which they were first launched.
    """

    def __init__(self, arch: int, launchers: Callable[..., Any] | None = None) -> None:
        """Takes the architecture and, where launchers are to be compiled as well, Triton's class of them."""
        from triton.backends.compiler import GPUTarget

        self._arch, self._target, self._launchers = arch, GPUTarget("cuda", arch, WARP), launchers
        self.compiled: list[str] = []
        self.utils = SimpleNamespace(
            load_binary=lambda name, *_: (1, 1, 0, 0, MOST_THREADS),
            get_device_properties=lambda device: {"max_shared_mem": SHARED_BYTES},
        )

    def get_current_target(self) -> Any:
        """Return the target that kernels are compiled for."""
        return self._target

    def get_current_device(self) -> int:
        """Return a number by which the JIT keeps what it compiled."""
        return self._arch

    def get_current_stream(self, device: int) -> int:
        """Return the default stream."""
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Return what stands in for the launcher of one compiled kernel."""
        self.compiled.append(metadata.name)
        if self._launchers is not None:
            self._launchers(source, metadata)
        return lambda *arguments: None


@contextmanager
def compiling(arch: int = HOPPER, launchers: bool = False) -> Iterator[NullDriver]:
    """Let the package's operations take "meta" tensors and compile every kernel that they would launch.

    Args:
        arch: Compute capability as 10 * major + minor; the operations choose their tiles for 90.
        launchers: Compile the launchers in C too, where Triton has one for each kernel; needs `stub_cuda`.

    Raises:
        RuntimeError: Kernels were defined for Triton's interpreter.
    """
    if interpreted():
        raise RuntimeError("TRITON_INTERPRET must be 0 or unset where kernels are compiled")
    from triton.runtime.driver import driver

    before = driver.active if torch.cuda.is_available() else None
    null = NullDriver(arch, _launchers() if launchers else None)
    driver.set_active(null)
    served = [mock.patch.dict(op.missing, {"triton": lambda device, dtype: None}) for op in OPS.values()]
    # The "meta" device has no autocast to ask for or to turn off.
    served += [
        mock.patch.object(torch, "autocast", lambda *_, **__: nullcontext()),
        mock.patch.object(torch, "is_autocast_enabled", lambda *_: False),
    ]
    try:
        for each in served:
            each.start()
        yield null
    finally:
        for each in served:
            each.stop()
        if before is not None:
            driver.set_active(before)


def stub_cuda(folder: Path) -> Path:
    """Make and load a library that stands for CUDA's driver where there is none; return its file.

    Launchers in C are linked against it. It has the functions that they name, none of which is called.
    """
    from triton.backends.nvidia import driver as nvidia

    text = "".join(
        path.read_text() for path in Path(nvidia.__file__).parent.glob("driver.*") if path.is_file()
    )
    names = sorted(set(re.findall(r"\b(cu[A-Z]\w+)\s*\(", text)))
    source, library = folder / "cuda.c", folder / STUB
    source.write_text("".join(f"int {name}(void) {{ return 999; }}\n" for name in names))
    compiler = os.environ.get("CC", "gcc")
    command = [compiler, "-shared", "-fPIC", "-w", f"-Wl,-soname,{STUB}", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return library


def _launchers() -> Callable[..., Any] | None:
    """Return Triton's class of launchers where each is compiled, None where one serves every kernel."""
    from triton.backends.nvidia import driver as nvidia

    return nvidia.CudaLauncher if hasattr(nvidia, "make_launcher") else None
