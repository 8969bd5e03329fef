"""The sources compile against torch 2.11, the oldest release they serve, and against the newest."""

from __future__ import annotations

import re
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from csrc import build
from tests.csrc import torch_headers
from tests.csrc.symbols import foreign_symbols, undefined_symbols

OLDEST = "2.11.0"
_MACROS = Path(__file__).with_name("torch_2_11_macros.txt")
_USED = re.compile(r"\b(?:STD|TORCH|STABLE|AOTI|C10)_[A-Z0-9_]+\b")
_INCLUDE = re.compile(r'^#include (?:"(.+)"|<(.+)>)$', re.MULTILINE)


def headers_of() -> dict[str, set[str]]:
    """Macro of torch 2.11 -> the headers that define it."""
    found: dict[str, set[str]] = {}
    for line in _MACROS.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            name, header = line.split()
            found.setdefault(name, set()).add(header)
    return found


def included(path: Path, text: str) -> set[str]:
    """The headers that a source includes by itself or through headers of csrc/."""
    found: set[str] = set()
    for own, foreign in _INCLUDE.findall(text):
        header = path.parent / own
        found |= included(header, header.read_text(encoding="utf-8")) if own else {foreign}
    return found


def macros_without_header(path: Path, text: str) -> Iterator[str]:
    """What is wrong with the macros of torch in a source.

    Headers of torch include each other differently in each release, so a macro needs its own header.
    """
    headers, given = headers_of(), included(path, text)
    for name in sorted(set(_USED.findall(re.sub(r"//.*", "", text)))):
        wanted = headers.get(name)
        if wanted is None:
            yield f"{name} must be a macro of torch 2.11"
        elif not wanted & given:
            yield f"{name} must come with one of {sorted(wanted)}"


@pytest.mark.parametrize("path", build.sources(*build.SUFFIXES), ids=lambda path: path.name)
def test_every_macro_of_torch_comes_with_its_header(path: Path) -> None:
    assert not list(macros_without_header(path, path.read_text(encoding="utf-8")))


def test_a_macro_without_its_header_is_found() -> None:
    path = build.HERE / "orthogonality/cuda.cu"
    text = path.read_text(encoding="utf-8").replace("#include <torch/csrc/stable/macros.h>\n", "")
    (found,) = macros_without_header(path, text)
    assert found.startswith("STD_CUDA_KERNEL_LAUNCH_CHECK must come with")
    assert list(macros_without_header(path, "STD_NO_SUCH_MACRO();")) == [
        "STD_NO_SUCH_MACRO must be a macro of torch 2.11"
    ]


def test_headers_come_out_of_a_wheel_that_lists_folders(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "torch.whl", "w") as wheel:
        for name in (
            "torch/include/",
            "torch/include/a/",
            "torch/include/a/b.h",
            "torch/version.py",
            "torch/c.py",
        ):
            wheel.writestr(name, "" if name.endswith("/") else name)
    with zipfile.ZipFile(tmp_path / "torch.whl") as wheel:
        torch_headers.unpack(wheel, tmp_path / "2.0")
    found = {
        path.relative_to(tmp_path / "2.0").as_posix()
        for path in (tmp_path / "2.0").rglob("*")
        if path.is_file()
    }
    assert found == {"include/a/b.h", "version.py"}


@pytest.fixture(params=["oldest", "newest"])
def torch(request: pytest.FixtureRequest) -> Path:
    """The unpacked headers of a release."""
    found = torch_headers.fetched()
    old = [folder for folder in found if folder.name == OLDEST]
    chosen = old if request.param == "oldest" else [f for f in found if f not in old]
    if not chosen:
        pytest.skip(f"headers of the {request.param} torch are not in {torch_headers.FOLDER}: make headers")
    return chosen[-1]


@pytest.mark.slow
def test_cuda_source_compiles(torch: Path, tmp_path: Path) -> None:
    try:
        nvcc, _ = build.find_nvcc()
    except build.Unavailable as reason:
        pytest.skip(str(reason))
    for source in build.sources(".cu"):
        target = tmp_path / f"{source.stem}.o"
        command = [
            *build.cuda_command(nvcc, torch),
            "-Werror=all-warnings",
            "-c",
            str(source),
            "-o",
            str(target),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{torch.name}: {done.stderr}"
        assert not foreign_symbols(undefined_symbols(target))


@pytest.mark.slow
def test_cpu_sources_compile(torch: Path) -> None:
    try:
        compiler = build.find_compiler()
    except build.Unavailable as reason:
        pytest.skip(str(reason))
    command = [compiler, *build.CXX_FLAGS, *build.DEFINES, f"-isystem{torch / 'include'}", "-fsyntax-only"]
    files = [str(path) for path in build.sources(".cpp")]
    done = subprocess.run([*command, *files], capture_output=True, text=True)
    assert done.returncode == 0, f"{torch.name}: {done.stderr}"


@pytest.mark.slow
def test_macros_are_those_of_the_release() -> None:
    include = torch_headers.FOLDER / OLDEST / "include"
    if not include.is_dir():
        pytest.skip(f"headers of torch {OLDEST} are not in {torch_headers.FOLDER}: make headers")
    found: dict[str, set[str]] = {}
    for name, header in torch_headers.macros(include):
        found.setdefault(name, set()).add(header)
    assert found == headers_of()
