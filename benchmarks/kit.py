"""What one machine prepares for another: native libraries and compiled kernels, in one archive.

libraries/    what csrc/build.py makes
kernels/      Triton's cache, which must be unpacked to the folder in which it was made (`CACHE`)
kit.json      what both were made with
"""

from __future__ import annotations

import io
import json
import platform
import shutil
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from benchmarks import machine
from csrc import build

KIT = machine.ROOT / "build" / "gpu-kit.tgz"
# Triton writes absolute paths into its cache, so the folder is the same on every machine.
CACHE = Path("/tmp/cram-triton-cache")
LIBRARIES = machine.ROOT / "cram_kernels"
MANIFEST = "kit.json"
_LIBRARY_FILES = {*build.LIBRARIES.values(), build.REPORT}


@dataclass(frozen=True)
class Made:
    """What a kit was made with, or what a machine has: both must agree where a kit is to be of use."""

    python: str
    triton: str | None
    sources: str

    @classmethod
    def here(cls) -> Made:
        """Return what this interpreter and this checkout have."""
        python = f"{sys.implementation.name} {sys.version_info.major}.{sys.version_info.minor}"
        return cls(f"{python} {platform.machine()}", machine.package_version("triton"), build.digest())

    def differences(self, other: Made) -> list[str]:
        """Return what differs, in words; empty where nothing does."""
        pairs = zip(asdict(self).items(), asdict(other).values(), strict=True)
        return [f"{name} {mine} there, {theirs} here" for (name, mine), theirs in pairs if mine != theirs]


def pack(file: Path, libraries: Path, kernels: Path) -> None:
    """Write an archive of the native libraries in one folder and the kernels in another."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".part")
    with tarfile.open(partial, "w:gz") as archive:
        text = json.dumps(asdict(Made.here()), indent=1).encode()
        entry = tarfile.TarInfo(MANIFEST)
        entry.size, entry.mtime = len(text), int(time.time())
        archive.addfile(entry, io.BytesIO(text))
        for name in sorted(_LIBRARY_FILES):
            if (libraries / name).is_file():
                archive.add(libraries / name, f"libraries/{name}")
        archive.add(kernels, "kernels")
    partial.replace(file)


def unpack(file: Path, libraries: Path = LIBRARIES, cache: Path = CACHE) -> list[str]:
    """Put the libraries and the kernels of an archive where they are looked for; return lines for a reader.

    Libraries of other sources stay in the archive. Kernels of another Triton do no harm: nothing finds them.

    Raises:
        ValueError: The archive holds a name that no kit has.
    """
    taken = []
    with TemporaryDirectory(dir=libraries) as scratch, tarfile.open(file) as archive:
        archive.extractall(scratch, members=_checked(archive), filter="data")
        folder = Path(scratch)
        made, here = Made(**json.loads((folder / MANIFEST).read_text())), Made.here()
        said = [f"kit: {text}" for text in made.differences(here)]
        if made.sources == here.sources:
            for path in (folder / "libraries").glob("*"):
                path.replace(libraries / path.name)
                taken += [path.name] if path.suffix == ".so" else []
        before = count_kernels(cache)
        shutil.copytree(folder / "kernels", cache, dirs_exist_ok=True)
    added = count_kernels(cache) - before
    return [*said, f"kit: {', '.join(taken) or 'no library'}, {added} kernels"]


def _checked(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in archive:
        path = PurePosixPath(member.name)
        known = member.name in (MANIFEST, "kernels") or path.parts[0] == "kernels"
        known |= path.parts[0] == "libraries" and path.name in _LIBRARY_FILES
        if not known:
            raise ValueError(
                f"{MANIFEST}, libraries/ and kernels/ must be all that a kit holds, got {member.name!r}"
            )
        yield member


def count_kernels(cache: Path = CACHE) -> int:
    """Return how many compiled kernels a cache holds."""
    return len(list(cache.glob("*/*.cubin")))


def pack_results(folder: Path, file: Path) -> None:
    """Write everything in a folder into one archive, which is replaced only when it is whole."""
    partial = file.with_suffix(".part")
    with tarfile.open(partial, "w:gz") as archive:
        archive.add(folder, folder.name)
    partial.replace(file)
