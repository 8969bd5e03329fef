"""Every operator changes what it should, once, and leaves words and types alone."""

from __future__ import annotations

import ast

import pytest

from benchmarks.mutation.operators import mutants_of, mutate

CHANGES = [
    ("a < b", {"a <= b"}),
    ("a == b", {"a != b"}),
    ("a is None", {"a is not None"}),
    ("a in b", {"a not in b"}),
    ("0 <= a < n", {"0 < a < n", "0 <= a <= n", "1 <= a < n"}),
    ("a + b", {"a - b"}),
    ("a * b", {"a / b"}),
    ("a & b", {"a | b"}),
    ("-a", {"a"}),
    ("-1", {"-2"}),
    ("f(True)", {"f(False)", "pass"}),
    ("a and b", {"a or b"}),
    ("not a", {"a"}),
    ("a[i:j]", {"a[i + 1:j]", "a[i:j + 1]"}),
    ("f(a, b)", {"f(b, a)", "pass"}),
    ("f(a, a)", {"pass"}),
    ("a.b = c", {"pass"}),
    ("a += b", {"a -= b", "pass"}),
    ("raise ValueError(f'{a + 1}')", {"pass"}),
    (
        "def f(a: int | None = 1): return a",
        {"def f(a: int | None=2): return a", "def f(a: int | None=1): return None"},
    ),
    ("zip(a, b, strict=True)", {"zip(b, a, strict=True)", "pass"}),
    ("isinstance(a, int | B)", {"pass"}),
    ("a = 'words'", set()),
    ("a = b", set()),
    ("return_ = None", set()),
]


@pytest.mark.parametrize(("text", "expected"), CHANGES, ids=[text for text, _ in CHANGES])
def test_each_place_is_changed_once(text: str, expected: set[str]) -> None:
    found = mutants_of("x.py", text)
    plain = {" ".join(mutate(text, each.index).split()) for each in found}
    assert plain == expected and len(found) == len(expected)
    for each in found:
        ast.parse(mutate(text, each.index))
        assert each.before != each.after and each.source == "x.py" and each.line == 1


def test_a_mutant_is_named_by_its_place_and_not_by_its_line() -> None:
    text = "class A:\n    def f(self, a):\n        g(a < 1)\n        h(a < 1)\n"
    names = [each.name for each in mutants_of("x.py", text)]
    assert names == [each.name for each in mutants_of("x.py", "\n\n" + text)]
    assert "x.py A.f: a < 1 -> a <= 1" in names and "x.py A.f: a < 1 -> a <= 1 (2)" in names
    assert len(set(names)) == len(names)
