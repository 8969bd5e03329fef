"""The build hook: what a wheel holds, what happens without compiler or torch, and the ABI of the library."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cram_kernels import available_impls, native_libraries
from cram_kernels.library import LIBRARIES, REPORT, _load
from csrc import build
from tests.csrc.symbols import allowed_symbols, foreign_symbols, undefined_symbols

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = ROOT / "cram_kernels"
COPIED = ("pyproject.toml", "README.md", "LICENSE", "csrc", "cram_kernels")


def has_compiler() -> bool:
    try:
        return bool(build.find_compiler())
    except build.Unavailable:
        return False


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")


@needs_compiler
def test_library_is_there_and_built_from_these_sources() -> None:
    report = json.loads((INSTALLED / REPORT).read_text(encoding="utf-8"))
    assert report["sources"] == build.digest(), "the library is older than csrc/: run python csrc/build.py"
    assert "cpu" not in report["missing"], report
    assert native_libraries()["cpu"] is None
    assert available_impls()["orthogonality_penalty"]["native"] is None


@needs_compiler
def test_library_needs_nothing_but_the_stable_abi() -> None:
    symbols = undefined_symbols(INSTALLED / LIBRARIES["cpu"], "--dynamic")
    assert not foreign_symbols({name.split("@")[0] for name in symbols})
    unversioned = {name for name in symbols if "@" not in name} - allowed_symbols()
    assert unversioned <= {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}
    assert any(name.startswith("torch_library_impl") for name in symbols)


@pytest.mark.parametrize("name", ["torch_tag_core", "_ZN3c105ErrorC1Ev", "_ZNK2at10TensorBase3dimEv"])
def test_symbols_outside_the_abi_are_found(name: str) -> None:
    assert foreign_symbols({name, "torch_parallel_for", "memcpy", "_ZNSt13runtime_errorD1Ev"}) == {name}


def build_wheel(folder: Path, **environment: str) -> dict[str, bytes]:
    """Build a wheel of a copy of the sources with the hook; return its native files by name, and its name."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so", REPORT)
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy(source, folder / name)
    code = "import sys; from setuptools.build_meta import build_wheel; build_wheel('dist')"
    kept = {name: value for name, value in os.environ.items() if name not in ("CXX", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=kept | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (folder / "dist").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith("cram_kernels/")]
        native = {Path(name).name: archive.read(name) for name in names if name.endswith((".so", REPORT))}
    return native | {"wheel": wheel.name.encode()}


@needs_compiler
def test_wheel_holds_the_library_for_any_python(tmp_path: Path) -> None:
    found = build_wheel(tmp_path)
    assert b"-py3-none-linux_" in found["wheel"]
    assert found[LIBRARIES["cpu"]].startswith(b"\x7fELF")
    report = json.loads(found[REPORT])
    assert report["sources"] == build.digest() and "cpu" not in report["missing"]


def test_installation_without_compiler_says_what_is_missing(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "source").mkdir()
    found = build_wheel(tmp_path / "source", PATH=str(empty))
    assert LIBRARIES["cpu"] not in found
    assert "no C++ compiler was found" in json.loads(found[REPORT])["missing"]["cpu"]
    (empty / REPORT).write_bytes(found[REPORT])
    reason = _load("cpu", empty)
    assert reason is not None and "libcram_cpu.so was not built: no C++ compiler" in reason
    assert _load("cuda", empty) == reason


def test_library_that_does_not_load_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / LIBRARIES["cpu"]).write_bytes(b"not a library")
    assert "does not load into torch" in str(_load("cpu", tmp_path))
    (tmp_path / "empty").mkdir()
    assert "the build hook did not run" in str(_load("cpu", tmp_path / "empty"))


def fake_torch(folder: Path, cuda: str | None) -> Path:
    (folder / "include/torch/csrc/stable").mkdir(parents=True)
    (folder / "include/torch/csrc/stable/library.h").touch()
    (folder / "version.py").write_text(
        f"from typing import Optional\n__version__ = '2.11.0'\ncuda: Optional[str] = {cuda!r}\n"
    )
    return folder


def test_cuda_library_only_for_a_torch_with_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = fake_torch(tmp_path / "cpu", None)
    with pytest.raises(build.Unavailable, match=r"torch 2\.11\.0 has no CUDA"):
        build.compile_cuda(torch, tmp_path / "library.so")
    torch = fake_torch(tmp_path / "cuda", "12.8")
    monkeypatch.setattr(build, "find_nvcc", lambda: ("nvcc", "13.0"))
    with pytest.raises(build.Unavailable, match=r"major version of torch's CUDA 12\.8, got 13\.0"):
        build.compile_cuda(torch, tmp_path / "library.so")
    monkeypatch.undo()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(build.Unavailable, match="nvcc was not found"):
        build.compile_cuda(torch, tmp_path / "library.so")


@pytest.mark.parametrize(
    ("cuda", "missing", "status"),
    [
        (None, {}, 0),
        (None, {"cuda": "torch has no CUDA"}, 0),
        (None, {"cpu": "no compiler"}, 1),
        ("13.0", {}, 0),
        ("13.0", {"cuda": "nvcc failed: an error"}, 1),
    ],
)
def test_exit_status_tells_of_a_library_that_torch_could_use(
    cuda: str | None,
    missing: dict[str, str],
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch = fake_torch(tmp_path / "torch", cuda)
    monkeypatch.setattr(build, "torch_folder", lambda: torch)
    monkeypatch.setattr(build, "build", lambda folder: missing)
    assert build.main() == status
    said = [f"missing: {LIBRARIES[name]}: {reason}" for name, reason in missing.items()]
    assert capsys.readouterr().out.splitlines() == (said if status else [])


def test_torch_that_is_absent_or_old_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_spec", lambda _: None)
    monkeypatch.setattr(build.sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr(build.site, "getsitepackages", lambda: [])
    monkeypatch.setattr(build.site, "getusersitepackages", lambda: str(tmp_path))
    with pytest.raises(build.Unavailable, match="torch was not there when cram-mcit was built"):
        build.torch_folder()
    torch = fake_torch(tmp_path / "torch", None)
    assert build.torch_folder() == torch
    (torch / "include/torch/csrc/stable/library.h").unlink()
    with pytest.raises(build.Unavailable, match=r"torch must be 2\.11 or newer, got 2\.11\.0"):
        build.torch_folder()


@needs_compiler
def test_compiler_error_is_a_reason(tmp_path: Path) -> None:
    broken = tmp_path / "broken.cpp"
    broken.write_text("int broken = ;\n")
    with pytest.raises(build.Unavailable, match="failed: .*error"):
        build.call([build.find_compiler(), "-c", str(broken)], tmp_path / "broken.o")
    assert not (tmp_path / "broken.o").exists()
