"""Changed functions take their new code in place; what acts at import is told apart."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.mutation import patches
from benchmarks.mutation.operators import mutants_of, mutate

TEXT = """
import functools

LIMIT = 3

def outer(value, most=2):
    def inner(x):
        return x + most
    return [inner(each) for each in range(value)]

class Box:
    size = 4

    def __init__(self):
        super().__init__()
        self.full = True

    @property
    def half(self):
        return self.size // 2

    @functools.cache
    def cached(self):
        return self.size * 5
"""


@pytest.fixture
def module(tmp_path: Path) -> ModuleType:
    path = tmp_path / "changed_in_place.py"
    path.write_text(TEXT)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def places(module: ModuleType, change: str) -> patches.Places | None:
    """Where the mutant of that text goes; None if it acts at import."""
    path = str(module.__file__)
    (mutant,) = [each for each in mutants_of("x.py", TEXT) if f"{each.before} -> {each.after}" == change]
    codes = patches.changed_functions(path, TEXT, mutate(TEXT, mutant.index))
    return None if codes is None else patches.places(patches.functions().get(path, []), codes)


def test_a_changed_function_gets_its_code(module: ModuleType) -> None:
    box = module.Box()
    assert (module.outer(2), box.half, box.cached()) == ([2, 3], 2, 20)
    for change in (
        "x + most -> x - most",
        "self.size // 2 -> self.size * 2",
        "self.size * 5 -> self.size / 5",
    ):
        found = places(module, change)
        assert found is not None and len(found) == 1
        for function, code in found:
            function.__code__ = code
    assert (module.outer(2), box.half, module.Box().cached()) == ([-2, -1], 8, 0.8)


@pytest.mark.parametrize(
    "change",
    [
        "LIMIT = 3 -> LIMIT = 4",
        "size = 4 -> size = 5",
        "value, most=2 -> value, most=3",
        # The class has a cell for `super`.
        "super().__init__() -> pass",
    ],
)
def test_what_acts_at_import_has_no_new_functions(module: ModuleType, change: str) -> None:
    assert places(module, change) is None


def test_a_module_that_is_not_imported_has_no_place(tmp_path: Path) -> None:
    changed = mutate(TEXT, next(each.index for each in mutants_of("x.py", TEXT) if each.after == "x - most"))
    codes = patches.changed_functions(str(tmp_path / "other.py"), TEXT, changed)
    assert codes and patches.places([], codes) == []
    assert "other" not in sys.modules
