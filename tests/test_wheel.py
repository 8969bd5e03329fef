"""The wheel: every file of the packages, the notices of what others made, and its size."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_wheel_holds_every_file_of_the_packages(tmp_path: Path) -> None:
    packages = ("cram", "cram_kernels")
    for package in packages:
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    # The build hook without its sources: tests/csrc has the wheel with the libraries.
    (tmp_path / "csrc").mkdir()
    shutil.copy(ROOT / "csrc" / "build.py", tmp_path / "csrc")
    command = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", command], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.stat().st_size < 30_000_000
    names = zipfile.ZipFile(wheel).namelist()
    notices = {n.split("/licenses/")[1] for n in names if "/licenses/" in n}
    assert notices == {"LICENSE", *(n for n in names if "/LICENSE-" in n and n.startswith("cram/"))}
    shipped = {n for n in names if n.split("/")[0] in packages}
    present = {
        p.relative_to(ROOT).as_posix() for name in packages for p in (ROOT / name).rglob("*") if p.is_file()
    }
    built = "cram_kernels/native.json"
    present = {p for p in present if "__pycache__" not in p and not p.endswith((".so", built))}
    assert shipped - {built} == present, shipped ^ present
