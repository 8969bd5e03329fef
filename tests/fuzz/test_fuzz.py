"""Bundles, run folders, streams and calls under random damage; `-m slow` does thousands of mutations."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cram.methods import METHODS
from tests.fuzz import bundles, calls, runs, streams
from tests.fuzz.guard import Tally

TARGETS: dict[str, tuple[Callable[[Path], Any], Callable[[Any, range, Path], Tally]]] = {
    "bundles": (bundles.prepare, bundles.run),
    "streams": (streams.prepare, streams.run),
    "runs": (runs.prepare, runs.run),
    "calls": (calls.prepare, calls.run),
}
SHORT = {"bundles": 40, "streams": 60, "runs": 4, "calls": 100}
LONG = {"bundles": 2600, "streams": 2000, "runs": 400, "calls": 3000}
# Another first seed makes other mutations.
FIRST = int(os.environ.get("CRAM_FUZZ_SEED", "0"))


@pytest.mark.parametrize("target", TARGETS)
def test_a_little_damage_is_refused_or_harmless(target: str, tmp_path: Path) -> None:
    prepare, run = TARGETS[target]
    (tmp_path / "whole").mkdir()
    run(prepare(tmp_path / "whole"), range(FIRST, FIRST + SHORT[target]), tmp_path).check()


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_much_damage_is_refused_or_harmless(target: str, tmp_path: Path) -> None:
    prepare, run = TARGETS[target]
    if target == "bundles":
        prepare = partial(bundles.prepare, methods=tuple(METHODS))
    (tmp_path / "whole").mkdir()
    first = FIRST + 10_000
    run(prepare(tmp_path / "whole"), range(first, first + LONG[target]), tmp_path).check()
