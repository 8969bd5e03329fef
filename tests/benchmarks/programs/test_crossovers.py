"""The table of crossovers: read, written, and the rule by which a measurement becomes a row."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.programs import crossovers
from cram_kernels import native_libraries
from cram_kernels.crossovers import crossovers as in_force


def test_every_row_is_read_and_written_as_it_stands() -> None:
    text, rows = crossovers.FILE.read_text(), crossovers.table()
    assert len(rows) == text.count("CRAM_CROSSOVER(") and {row.vendor for row in rows} >= {"Intel", "AMD", ""}
    for row in rows:
        assert crossovers.line(row) in text
        assert crossovers.written(text, row) == text


def test_a_new_row_replaces_its_own_or_goes_first() -> None:
    text, row = crossovers.FILE.read_text(), crossovers.table()[0]
    changed = replace(row, base=row.base + 1)
    assert crossovers.line(changed) in crossovers.written(text, changed)
    assert crossovers.line(row) not in crossovers.written(text, changed)
    new = replace(row, vendor="Other")
    added = crossovers.written(text, new)
    assert added.index(crossovers.line(new)) < added.index(crossovers.line(row))


def test_a_row_has_the_first_run_of_wins() -> None:
    assert crossovers.span({1: 0.9, 2: 1.02, 4: 0.97, 8: 1.1, 16: 0.5}) == (1, 4)
    assert crossovers.span({8: 0.9, 1: 1.2, 16: 1.3}) == (8, 8)
    assert crossovers.span({1: 1.2, 8: 1.1}) == (1, 0)


def test_a_tie_at_the_end_is_torchs() -> None:
    assert crossovers.span({1: 0.9, 2: 0.99, 4: 1.01}) == (1, 1)
    assert crossovers.span({1: 1.0, 2: 0.99}) == (1, 0)


def test_only_products_that_the_library_has_are_timed() -> None:
    row = crossovers.table()[0]
    units = {unit: replace(row, unit=unit) for unit in ("tiles", "pairs", "avx2")}
    timed = {
        unit: [field for key, field in crossovers.FIELDS.items() if crossovers.computes(row, *key)]
        for unit, row in units.items()
    }
    assert timed == {
        "tiles": ["base", "half_base", "half_gradient"],
        "pairs": ["base", "half_base"],
        "avx2": ["base", "half_base"],
    }


@pytest.mark.skipif(native_libraries()["cpu"] is not None, reason=str(native_libraries()["cpu"]))
def test_the_row_in_force_is_in_the_table() -> None:
    found = in_force()
    assert found is not None and found[0] in crossovers.table()
