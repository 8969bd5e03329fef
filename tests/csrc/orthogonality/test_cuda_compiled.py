"""The CUDA source compiles for every shipped architecture, without spills and within its occupancy."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from csrc import build
from tests.csrc.symbols import foreign_symbols, undefined_symbols

# Registers a thread, such that the blocks that hide the memory's latency fit a multiprocessor's 65536.
MOST_REGISTERS = {"pool": 64, "products": 128, "middle": 64, "combine": 96}
MOST_SHARED_BYTES = 48 * 1024


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The object file of the CUDA source, and what the assembler said about its kernels."""
    try:
        nvcc, _ = build.find_nvcc()
    except build.Unavailable as reason:
        pytest.skip(str(reason))
    target = tmp_path_factory.mktemp("cuda") / "orthogonality.o"
    command = [*build.cuda_command(nvcc, build.torch_folder()), "-Werror=all-warnings", "-Xptxas=-v", "-c"]
    source = build.HERE / "orthogonality/cuda.cu"
    done = subprocess.run([*command, str(source), "-o", str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target, done.stderr


def test_resources(compiled: tuple[Path, str]) -> None:
    seen = set()
    for text in compiled[1].split("Compiling entry function ")[1:]:
        name, architecture = re.findall(r"'(\S+)' for 'sm_(\d+)'", text)[0]
        numbers = [
            re.search(rf"(\d+) (?:bytes )?{what}|$", text)[1]  # type: ignore[index]
            for what in ("stack frame", "spill stores", "spill loads", "registers", "smem")
        ]
        (kernel,) = (kernel for kernel in MOST_REGISTERS if re.search(rf"\d{kernel}E", name))
        stack, stores, loads, registers, shared = (int(number or 0) for number in numbers)
        assert (stack, stores, loads) == (0, 0, 0), f"{kernel} spills on sm_{architecture}"
        assert registers <= MOST_REGISTERS[kernel], f"{kernel}: {registers} registers on sm_{architecture}"
        assert shared <= MOST_SHARED_BYTES
        seen.add((kernel, architecture))
    assert seen == {(kernel, architecture) for kernel in MOST_REGISTERS for architecture in ("80", "90")}


def test_object_needs_nothing_but_the_stable_abi(compiled: tuple[Path, str]) -> None:
    symbols = undefined_symbols(compiled[0])
    assert not foreign_symbols(symbols)
    assert "aoti_torch_get_current_cuda_stream" in symbols
