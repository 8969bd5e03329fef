"""What CONTRIBUTING.md says of the look of native sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from csrc.build import sources

MAX_COLUMNS = 120
SOURCES = sources(".h", ".cpp", ".cu", ".cuh")


def breaches(text: str) -> list[str]:
    """Lines that are too long, that hold a tab, or that end in spaces."""
    lines = text.splitlines()
    return [line for line in lines if len(line) > MAX_COLUMNS or "\t" in line or line != line.rstrip()]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_native_sources_keep_the_style(path: Path) -> None:
    assert not breaches(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("line", ["x" * 121, "\tx;", "x; "])
def test_a_breach_is_found(line: str) -> None:
    assert breaches(f"a;\n{line}\nb;") == [line]
