"""Builds the native libraries out of this folder; the build hook of pyproject.toml.

    libcram_cpu.so     every *.cpp: schemas and CPU kernels; always
    libcram_cuda.so    every *.cu; where torch has CUDA and a matching nvcc is there
    native.json        digest of the sources, and why a library is missing

A library that cannot be built never fails an installation: the reason lands in native.json, where `cram
info` finds it. Only torch's stable ABI is used, so one library serves torch 2.11 and newer and any Python.
An isolated build has no torch to import; its headers are found in the installation of the interpreter that
runs the build.

Without an installation: `python csrc/build.py` builds into cram_kernels/ beside this folder. Its exit status
is 1 where a library is missing that the torch there could use.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
SUFFIXES = (".h", ".cpp", ".cuh", ".cu")
LIBRARIES = {"cpu": "libcram_cpu.so", "cuda": "libcram_cuda.so"}
REPORT = "native.json"
# The oldest torch whose stable ABI the sources use: 2.11.
DEFINES = ("-DTORCH_TARGET_VERSION=0x020b000000000000",)
# Vector types are passed between inlined functions only, so their calling convention does not matter.
# GCC's own intrinsics read undefined registers on purpose.
QUIET = ("-Wno-psabi", "-Wno-attributes", "-Wno-maybe-uninitialized")
CXX_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", *QUIET)
ARCHITECTURES = (
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=sm_90",
    "-gencode=arch=compute_90,code=compute_90",
)
CUDA_FLAGS = ("-std=c++17", "-O3", "-DUSE_CUDA", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wno-attributes")


class Unavailable(Exception):
    """A library cannot be built here; the message says why."""


def digest() -> str:
    """Return a digest of every source, by which a library tells what it was built from."""
    found = hashlib.sha256()
    for path in sources(*SUFFIXES):
        found.update(path.relative_to(HERE).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def sources(*suffixes: str) -> list[Path]:
    """Return the files under this folder with one of the suffixes, in order of their paths."""
    return sorted(path for path in HERE.rglob("*") if path.suffix in suffixes)


def torch_folder() -> Path:
    """Return the folder of the torch package that belongs to this interpreter.

    Raises:
        Unavailable: There is none, or it has no stable ABI.
    """
    spec = find_spec("torch")
    places = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    names = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    places += [Path(name) / "torch" for name in (*names, site.getusersitepackages())]
    for place in places:
        if (place / "version.py").is_file():
            if not (place / "include/torch/csrc/stable/library.h").is_file():
                raise Unavailable(f"torch must be 2.11 or newer, got {version_of(place, '__version__')}")
            return place
    raise Unavailable(
        "torch was not there when cram-mcit was built; install torch first, then cram-mcit again"
    )


def version_of(torch: Path, name: str) -> str | None:
    """Return a constant of torch/version.py ("__version__", "cuda") without importing torch."""
    for node in ast.parse((torch / "version.py").read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            value = ast.literal_eval(node.value)  # type: ignore[attr-defined]
            return None if value is None else str(value)
    return None


def wanted(torch: Path) -> set[str]:
    """Return the libraries that an installation with this torch should have."""
    return {"cpu"} | ({"cuda"} if version_of(torch, "cuda") else set())


def compile_cpu(torch: Path, target: Path) -> None:
    """Compile the CPU library, as many files at a time as there are processors.

    Raises:
        Unavailable: There is no C++ compiler, or it fails.
    """
    files = sources(".cpp")
    if not files:
        raise Unavailable(f"no C++ source is in the folder of {Path(__file__).name}")
    compiler = find_compiler()
    command = [compiler, *CXX_FLAGS, *DEFINES, f"-isystem{torch / 'include'}", "-c"]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [Path(folder) / f"{index}.o" for index in range(len(files))]
        list(pool.map(lambda file, made: call([*command, str(file)], made), files, objects))
        link = (f"-L{torch / 'lib'}", "-ltorch_cpu")
        call([compiler, "-shared", *[str(path) for path in objects], *link], target)


def compile_cuda(torch: Path, target: Path) -> None:
    """Compile the CUDA library.

    Raises:
        Unavailable: torch has no CUDA, there is no nvcc of its major version, or it fails.
    """
    cuda = version_of(torch, "cuda")
    if cuda is None:
        raise Unavailable(f"torch {version_of(torch, '__version__')} has no CUDA")
    nvcc, found = find_nvcc()
    if found.split(".")[0] != cuda.split(".")[0]:
        raise Unavailable(f"nvcc must have the major version of torch's CUDA {cuda}, got {found} ({nvcc})")
    link = (f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-ltorch_cuda", "-cudart=shared")
    call([*cuda_command(nvcc, torch), "-shared", *[str(path) for path in sources(".cu")], *link], target)


def cuda_command(nvcc: str, torch: Path) -> list[str]:
    """Return the nvcc command without files and target."""
    return [nvcc, *CUDA_FLAGS, *DEFINES, *ARCHITECTURES, f"-isystem={torch / 'include'}"]


def find_compiler() -> str:
    """Return the C++ compiler: $CXX, or the first of c++, g++ and clang++.

    Raises:
        Unavailable: There is none.
    """
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return name
    raise Unavailable("no C++ compiler was found; install g++ or clang++, or set CXX")


def find_nvcc() -> tuple[str, str]:
    """Return nvcc ($CUDA_HOME/bin/nvcc or the one on the path) and its version.

    Raises:
        Unavailable: There is none.
    """
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which(str(Path(home) / "bin" / "nvcc") if home else "nvcc")
    if nvcc is None:
        raise Unavailable("nvcc was not found; install the CUDA toolkit or set CUDA_HOME")
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+\.\d+)", text)
    if release is None:
        raise Unavailable(f"nvcc must say its release, got {text!r} from {nvcc}")
    return nvcc, release[1]


def call(command: list[str], target: Path) -> None:
    """Run a compiler that writes `target`, which is replaced only when all went well.

    Raises:
        Unavailable: The compiler fails.
    """
    partial = target.with_suffix(".partial")
    print(" ".join([*command, "-o", str(target)]), flush=True)
    done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True, check=False)
    print(done.stdout + done.stderr, end="", flush=True)
    if done.returncode:
        partial.unlink(missing_ok=True)
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise Unavailable(f"{command[0]} failed: {errors[0] if errors else f'exit status {done.returncode}'}")
    partial.replace(target)


def build(folder: Path) -> dict[str, str]:
    """Build what can be built into `folder`; return library -> why it is missing."""
    missing: dict[str, str] = {}
    for name, compile_library in (("cpu", compile_cpu), ("cuda", compile_cuda)):
        target = folder / LIBRARIES[name]
        target.unlink(missing_ok=True)
        try:
            if not sys.platform.startswith("linux"):
                raise Unavailable(f"the native libraries are built on Linux only, got {sys.platform}")
            compile_library(torch_folder(), target)
        except Unavailable as reason:
            missing[name] = str(reason)
            print(f"{LIBRARIES[name]} is not built: {reason}", flush=True)
    report = {"sources": digest(), "missing": missing}
    (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return missing


class BuildPy(build_py):
    """`build_py` that also builds the native libraries, in place for an editable installation."""

    def run(self) -> None:
        """Copy the Python files, then build."""
        super().run()
        build(HERE.parent / "cram_kernels" if self.editable_mode else Path(self.build_lib) / "cram_kernels")

    def get_source_files(self) -> list[str]:
        """Also this folder, so that a source distribution can build."""
        own = [*sources(*SUFFIXES, ".py", ".md")]
        return [*super().get_source_files(), *(str(path.relative_to(HERE.parent)) for path in own)]


class Wheel(bdist_wheel):
    """`bdist_wheel` for libraries that depend on the platform but not on the Python version."""

    def finalize_options(self) -> None:
        """Mark the distribution as one with binaries, which are not extension modules of Python."""
        if sys.platform.startswith("linux"):
            self.distribution.has_ext_modules = lambda: True
        super().finalize_options()

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag py3-none-<platform>."""
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


def main() -> int:
    """Build in place; return 1 if a library is missing that this torch could use, after saying why."""
    missing = build(HERE.parent / "cram_kernels")
    try:
        expected = wanted(torch_folder())
    except Unavailable:
        expected = set(LIBRARIES)
    lost = {name: reason for name, reason in missing.items() if name in expected}
    for name, reason in lost.items():
        print(f"missing: {LIBRARIES[name]}: {reason}")
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(main())
