"""`cram info` says how to mend a missing library; every command names a namesake on the same machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from cram.cli import main
from cram.commands import info
from cram.console import namesake


def test_a_missing_library_comes_with_the_way_to_mend_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        info, "native_libraries", lambda: {"cpu": "libcram_cpu.so was not built", "cuda": "x"}
    )
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    place = lines.index("native library for cpu: libcram_cpu.so was not built")
    assert "pip install --no-build-isolation" in lines[place + 2] and "g++" in lines[place + 2]
    monkeypatch.setattr(info, "native_libraries", lambda: {"cpu": None, "cuda": "no nvcc"})
    main(["info"])
    assert "to mend it" not in capsys.readouterr().out


def test_another_distribution_of_this_name_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert namesake() is None
    other = tmp_path / "cram-0.7.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: cram\nVersion: 0.7\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["info", str(tmp_path)]) == 2
    first, _ = capsys.readouterr().err.splitlines()
    assert first.startswith("cram: another distribution, cram 0.7, installs the same import")
    assert "pip uninstall cram, then install cram-mcit again" in first
