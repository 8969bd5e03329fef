"""A kit comes back as it was packed; what does not fit this machine is said or left in the archive."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import kit


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A kit of one library and one kernel."""
    libraries, kernels = tmp_path / "made", tmp_path / "made-kernels"
    libraries.mkdir()
    (libraries / "libcram_cpu.so").write_bytes(b"library")
    (libraries / "native.json").write_text("{}")
    (libraries / "other.txt").write_text("not for a kit")
    (kernels / "HASH").mkdir(parents=True)
    (kernels / "HASH" / "_shrink.cubin").write_bytes(b"kernel")
    file = tmp_path / "kit.tgz"
    kit.pack(file, libraries, kernels)
    return file


def test_libraries_and_kernels_come_back(packed: Path, tmp_path: Path) -> None:
    libraries, cache = tmp_path / "libraries", tmp_path / "cache"
    libraries.mkdir()
    (cache / "OLD").mkdir(parents=True)
    (cache / "OLD" / "_expand.cubin").touch()
    assert kit.unpack(packed, libraries, cache) == ["kit: libcram_cpu.so, 1 kernels"]
    assert sorted(path.name for path in libraries.iterdir()) == ["libcram_cpu.so", "native.json"]
    assert (libraries / "libcram_cpu.so").read_bytes() == b"library"
    assert (cache / "HASH" / "_shrink.cubin").read_bytes() == b"kernel"
    assert kit.count_kernels(cache) == 2


def test_libraries_of_other_sources_stay_in_the_archive(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = replace(kit.Made.here(), sources="others", triton="0.0")
    monkeypatch.setattr(kit.Made, "here", lambda: here)
    libraries = tmp_path / "libraries"
    libraries.mkdir()
    said = kit.unpack(packed, libraries, tmp_path / "cache")
    assert [line.split()[1] for line in said] == ["triton", "sources", "no"]
    assert said[0].endswith("0.0 here") and said[-1] == "kit: no library, 1 kernels"
    assert not list(libraries.iterdir())


@pytest.mark.parametrize("name", ["../outside", "libraries/sitecustomize.py", "/etc/passwd", "elsewhere/x"])
def test_a_name_that_no_kit_has_is_refused(name: str, tmp_path: Path) -> None:
    file = tmp_path / "kit.tgz"
    with tarfile.open(file, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(ValueError, match="must be all that a kit holds, got"):
        kit.unpack(file, tmp_path, tmp_path / "cache")
    assert [path.name for path in tmp_path.iterdir()] == ["kit.tgz"]


def test_a_kernel_cannot_be_written_elsewhere(tmp_path: Path) -> None:
    file = tmp_path / "kit.tgz"
    with tarfile.open(file, "w:gz") as archive:
        text = json.dumps({"python": "", "triton": "", "sources": ""}).encode()
        entry = tarfile.TarInfo("kit.json")
        entry.size = len(text)
        archive.addfile(entry, io.BytesIO(text))
        archive.addfile(tarfile.TarInfo("kernels/../../outside"), io.BytesIO())
    with pytest.raises(tarfile.OutsideDestinationError):
        kit.unpack(file, tmp_path, tmp_path / "cache")


def test_results_are_packed_into_one_file(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    (folder / "logs").mkdir(parents=True)
    (folder / "logs" / "tests.log").write_text("log")
    kit.pack_results(folder, tmp_path / "gpu.tgz")
    with tarfile.open(tmp_path / "gpu.tgz") as archive:
        assert "results/logs/tests.log" in archive.getnames()
