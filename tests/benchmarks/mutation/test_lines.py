"""The lines that a test runs: recorded per source, kept until a file changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.mutation import lines
from benchmarks.mutation.operators import mutants_of

SOURCE = "benchmarks/markdown.py"


def test_lines_and_functions_of_the_sources_alone_are_recorded() -> None:
    from benchmarks.markdown import table

    recorder = lines.Recorder([SOURCE])
    with recorder.recording() as seen:
        assert table(("a",), [("1",)])
    table(("a",), [("2",)])
    assert set(seen.lines) == set(seen.functions) == {SOURCE}
    assert "table" in seen.functions[SOURCE]
    text = (lines.ROOT / SOURCE).read_text().splitlines()
    ran = {text[line - 1].strip().split(" ")[0] for line in seen.lines[SOURCE]}
    assert "return" in ran and "def" not in ran


def test_a_test_runs_a_statement_if_it_runs_one_of_its_lines() -> None:
    test = lines.Test("t", 0.1, {"a.py": [3, 9]})
    assert test.runs("a.py", (3, 3)) and test.runs("a.py", (7, 9)) and test.runs("a.py", (1, 3))
    assert not test.runs("a.py", (4, 8)) and not test.runs("b.py", (3, 3))


def test_what_was_kept_holds_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "ROOT", tmp_path)
    for name in ("test_a.py", "a.py", "b.py"):
        (tmp_path / name).write_text(name)
    tests = [lines.Test("test_a.py::one", 0.5, {"a.py": [1]})]
    digests = {name: lines.file_digest(name) for name in ("test_a.py", "a.py", "b.py")}
    assert lines.kept(tmp_path / "kept", "test_a.py", digests) is None
    lines.keep(tmp_path / "kept", "test_a.py", digests, tests)
    (tmp_path / "b.py").write_text("another")
    now = {name: lines.file_digest(name) for name in digests}
    assert lines.kept(tmp_path / "kept", "test_a.py", {"test_a.py": now["test_a.py"]}) == tests
    assert lines.kept(tmp_path / "kept", "test_a.py", digests) == tests
    assert lines.kept(tmp_path / "kept", "test_a.py", now) is None


def test_the_span_of_a_mutant_is_its_statement_without_the_block() -> None:
    text = "def f(a):\n    if (\n        a < 1\n    ):\n        g(a,\n          2)\n    return a\n"
    spans = {f"{each.before} -> {each.after}": each.span for each in mutants_of("x.py", text)}
    assert spans["a < 1 -> a <= 1"] == (2, 4)
    assert spans["g(a, 2) -> g(a, 3)"] == spans["g(a, 2) -> pass"] == (5, 6)
    assert spans["return a -> return None"] == (7, 7)
