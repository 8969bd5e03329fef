"""Compiles a .cu file for the CPU, where the headers of this folder play the CUDA device."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from csrc import build

HEADERS = Path(__file__).parent
_LAUNCH = re.compile(r"(\w+)<<<(.+?), (\w+), 0, stream>>>\(\s*(.+?)\);", re.DOTALL)
# What belongs to a real device: its guard, its stream, the error check after a launch, its dispatch key.
_REPLACED = (
    (re.compile(r"  const torch::stable::accelerator::DeviceGuard [^;]*;\n"), ""),
    (re.compile(r"  TORCH_ERROR_CODE_CHECK\(aoti_torch_get_current_cuda_stream[^;]*;\n"), ""),
    (re.compile(r"STD_CUDA_KERNEL_LAUNCH_CHECK\(\);"), ""),
    (re.compile(r"(STABLE_TORCH_LIBRARY_IMPL)\(cram, CUDA, m\)"), r"\1(cram_emulated, CPU, m)"),
)


def emulated_library(source: Path, folder: Path, name: str, changes: Mapping[str, str] | None = None) -> Path:
    """Compile `source` with its kernels emulated; the operations are those of `torch.ops.<name>`.

    Args:
        source: A .cu file of csrc/.
        folder: Where the library goes.
        name: Namespace of the operations, one a process.
        changes: Pieces of the source -> what stands there instead; each must be there.
    """
    text = source.read_text(encoding="utf-8")
    for old, new in (changes or {}).items():
        assert old in text, f"{source.name} must hold {old!r}"
        text = text.replace(old, new)
    text, launches = _LAUNCH.subn(r"emulation::launch(\2, \3, [&] { \1(\4); });", text)
    assert launches and "<<<" not in text, "every launch must be rewritten"
    for pattern, replacement in _REPLACED:
        text, count = pattern.subn(replacement, text)
        assert count, f"{source.name} must match {pattern.pattern}"
    schemas = (build.HERE / "ops.cpp").read_text(encoding="utf-8").replace("(cram, m)", f"({name}, m)")
    (folder / "kernels.cpp").write_text(text.replace("cram_emulated", name), encoding="utf-8")
    (folder / "schemas.cpp").write_text(schemas, encoding="utf-8")
    torch, target = build.torch_folder(), folder / f"{name}.so"
    command = [build.find_compiler(), "-std=c++17", "-O1", "-fPIC", "-shared", "-w", *build.DEFINES]
    paths = [f"-I{HEADERS}", f"-I{source.parent}", f"-isystem{torch / 'include'}"]
    files = [str(folder / "kernels.cpp"), str(folder / "schemas.cpp")]
    link = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-o", str(target)]
    done = subprocess.run([*command, *paths, *files, *link], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target
