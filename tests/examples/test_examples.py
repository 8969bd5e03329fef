"""Every example runs as it stands, on a tiny random base in the place of the one that is shipped."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

import cram.loading
from tests.cram import factories

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TESTED = {"own_data.py", "trainer.py", "import_lora.py", "merge_and_export.py"}
# They need TRL and ms-swift: tests/cram/learning/test_sft.py and test_ms_swift.py beside this file.
ELSEWHERE = {"sft.py", "ms_swift.py"}


@pytest.fixture(autouse=True)
def tiny_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Sources("builtin")` is a tiny random LLaVA with its own CLIP."""
    factories.save_all(tmp_path / "base")
    monkeypatch.setattr(cram.loading, "base_folder", lambda: tmp_path / "base")


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: Path | str) -> None:
    monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == TESTED | ELSEWHERE


def test_the_notebook_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (notebook,) = EXAMPLES.glob("*.ipynb")
    cells = json.loads(notebook.read_text())["cells"]
    assert all(cell.get("outputs", []) == [] for cell in cells), "a notebook is kept without its outputs"
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            code = (
                "".join(cell["source"])
                .replace("limit=256", "limit=16")
                .replace("max_steps=40", "max_steps=4")
            )
            exec(compile(code, f"{notebook.name}, cell {number}", "exec"), scope)
    assert len(scope["report"]["methods"]["cram"]["matrix"]) == len(scope["loaded"].expert_names) == 2
    assert "base -> " in capsys.readouterr().out


def test_own_data_are_learnt_and_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("own_data.py", monkeypatch, tmp_path / "own")
    said = capsys.readouterr().out
    assert re.search(r"accuracies after the last task: \[[\d.]+, [\d.]+\]\n", said)
    assert re.search(r"answer: .*\(group \d; .*\)\n", said, re.DOTALL)
    assert (tmp_path / "own/run/report.json").is_file()


def test_two_tasks_are_learnt_by_the_trainer_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("trainer.py", monkeypatch, tmp_path, "4")
    said = capsys.readouterr().out
    for task in ("sketches", "charts"):
        assert re.search(rf"^{task}: .*\(group \d; .*\), expected \S", said, re.MULTILINE | re.DOTALL), said
        assert (tmp_path / f"bundle/experts/{task}/adapter_config.json").is_file()


def test_a_lora_is_imported_merged_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("import_lora.py", monkeypatch, tmp_path / "lora")
    assert "(group 0; colours 1.00)" in capsys.readouterr().out
    run("merge_and_export.py", monkeypatch, tmp_path / "lora/bundle", tmp_path / "out")
    found = re.search(r"by at most (\S+)\n", capsys.readouterr().out)
    assert found and float(found.group(1)) < 1e-4
    assert (tmp_path / "out/merged/config.json").is_file()
