"""What is amiss with the native libraries is found and said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import kit
from benchmarks.programs import libraries
from csrc import build


def test_libraries_of_this_checkout_are_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    if not (kit.LIBRARIES / build.LIBRARIES["cpu"]).is_file():
        pytest.skip("the native library is not built")
    assert libraries.main(["--check"]) == 0
    assert "libcram_cpu.so: loads" in capsys.readouterr().out


def test_an_old_library_is_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / build.REPORT
    report.write_text(json.dumps({"sources": "older", "missing": {}}))
    monkeypatch.setattr(kit, "LIBRARIES", tmp_path)
    assert libraries.reasons()["cpu"] == "it is older than its sources"
    assert libraries.main(["--check"]) == 1

    def rebuilt() -> int:
        report.write_text(json.dumps({"sources": build.digest(), "missing": {}}))
        return 0

    monkeypatch.setattr(build, "main", rebuilt)
    libraries.main([])
    assert "to be built: libcram_cpu.so: it is older than its sources" in capsys.readouterr().out
