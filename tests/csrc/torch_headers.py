"""Fetches the headers of other torch releases, against which tests compile csrc/.

    python -m tests.csrc.torch_headers 2.11.0 newest        into build/torch/<version>/
    python -m tests.csrc.torch_headers --macros 2.11.0      the macros of a fetched release and their headers

A wheel of torch is downloaded with pip and unpacked in part: nothing is installed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "torch"
NEWEST = "newest"
# Where the stable ABI's macros stand, and how their names begin.
PUBLIC = ("torch/csrc/stable", "torch/headeronly", "torch/csrc/inductor/aoti_torch/c")
_MACRO = re.compile(r"^\s*#\s*define\s+((?:STD|TORCH|STABLE|AOTI|C10)_\w+)", re.MULTILINE)


def fetch(version: str) -> Path:
    """Unpack what compiling against a release needs; return its folder, which looks like an installed torch.

    Args:
        version: Such as "2.11.0", or "newest".
    """
    requirement = "torch" if version == NEWEST else f"torch=={version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([*command, "--dest", scratch, requirement], check=True)
        (wheel,) = Path(scratch).glob("torch-*.whl")
        folder = FOLDER / wheel.name.split("-")[1].split("+")[0]
        with zipfile.ZipFile(wheel) as archive:
            unpack(archive, folder)
    return folder


def unpack(archive: zipfile.ZipFile, folder: Path) -> None:
    """Write a wheel's headers and version; some wheels list folders as well."""
    for entry in archive.infolist():
        wanted = entry.filename.startswith("torch/include/") or entry.filename == "torch/version.py"
        if wanted and not entry.is_dir():
            target = folder / entry.filename.removeprefix("torch/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(entry))


def fetched() -> list[Path]:
    """Return the folders of the releases that are there, oldest first."""
    folders = [path.parent for path in FOLDER.glob("*/version.py")]
    return sorted(folders, key=lambda folder: [int(part) for part in re.findall(r"\d+", folder.name)])


def macros(include: Path) -> Iterator[tuple[str, str]]:
    """Yield the macros of the stable ABI in a release's include folder, each with its header."""
    for folder in PUBLIC:
        for header in sorted((include / folder).rglob("*.h")):
            for name in sorted(set(_MACRO.findall(header.read_text(encoding="utf-8")))):
                yield name, header.relative_to(include).as_posix()


def main() -> int:
    """Fetch the releases, or print their macros."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("version", nargs="+", help="a release of torch, or newest")
    parser.add_argument("--macros", action="store_true", help="print the macros of fetched releases")
    given = parser.parse_args()
    for version in given.version:
        if given.macros:
            print("\n".join(f"{name} {header}" for name, header in macros(FOLDER / version / "include")))
        else:
            print(fetch(version))
    return 0


if __name__ == "__main__":
    sys.exit(main())
