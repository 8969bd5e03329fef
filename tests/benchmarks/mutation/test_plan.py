"""The plan of mutants: sources with tests, a draw from a seed, a log that goes on, the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.mutation import plan
from benchmarks.mutation.equivalents import EQUIVALENTS, reason
from benchmarks.programs import mutants


def test_every_source_and_test_of_the_plan_is_there() -> None:
    found = plan.sources()
    assert len(found) == len(set(found)) > 60
    for source in found:
        assert (plan.ROOT / source).is_file() and plan.tests_of(source)
        assert all((plan.ROOT / test).is_file() for test in plan.tests_of(source)), source
    assert set(plan.TESTS) | set(plan.KERNEL_TESTS) <= set(found)


def test_a_draw_depends_on_the_seed_alone() -> None:
    source = "cram/bundle/runs.py"
    one, again, other = (plan.draw(source, 5, seed) for seed in (1, 1, 2))
    assert one == again != other and len(one) == 5
    assert {each.name for each in plan.draw(source, 3, 1)} < {each.name for each in one}
    assert len(plan.draw(source, 10_000, 1)) == len({each.name for each in plan.draw(source, 10_000, 2)})


@pytest.mark.parametrize(
    ("status", "changed", "holds"),
    [
        ("killed", "", True),
        ("killed", "tests_digest", True),
        ("killed", "source_digest", False),
        ("survived", "", True),
        ("survived", "tests_digest", False),
        ("survived", "source_digest", False),
    ],
)
def test_a_verdict_holds_while_what_it_rests_on_stays(status: str, changed: str, holds: bool) -> None:
    source = "cram/bundle/runs.py"
    row = {
        "source": source,
        "status": status,
        **plan.digests(source),
        **({changed: "old"} if changed else {}),
    }
    assert plan.holds(row) == holds


def test_every_equivalent_is_a_mutant_and_has_a_reason() -> None:
    known: dict[str, set[str]] = {}
    for name, why in EQUIVALENTS.items():
        source = name.split(" ")[0]
        known.setdefault(source, {each.name for each in plan.draw(source, 1 << 30, 0)})
        assert name in known[source], name
        assert len(why) > 20


@pytest.mark.parametrize(
    ("change", "equal"),
    [
        ("max(1, f(a, b)) -> max(f(a, b), 1)", True),
        ("min(a, b, c) -> min(b, a, c)", True),
        ("min(a, b, c) -> min(b, a, c) (2)", True),
        ("torch.promote_types(a, b) -> torch.promote_types(b, a)", True),
        ("max(1, a) -> max(2, a)", False),
        ("max(1, a + b) -> max(1, a - b)", False),
        ("pow(a, b) -> pow(b, a)", False),
        ("c - max(a, b) -> c + max(a, b)", False),
    ],
)
def test_exchanged_arguments_of_what_has_no_order_are_equivalent(change: str, equal: bool) -> None:
    assert bool(reason(f"cram/a.py A.f: {change}")) == equal


def row(source: str, status: str, name: str) -> dict[str, Any]:
    return {
        "source": source,
        "status": status,
        "name": name,
        "line": 3,
        "scope": "f",
        "before": "a",
        "after": "b",
    }


def test_the_table_counts_by_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EQUIVALENTS, "same", "there is nothing to see")
    rows = [
        *(
            row("cram/routing/groups.py", status, status)
            for status in ("killed", "slow", "broken", "survived")
        ),
        row("cram/routing/router.py", "survived", "same"),
        row("cram/bundle/format.py", "killed", "k"),
    ]
    text = plan.summary(rows)
    assert "| cram/routing | 5 | 1 | 3 | 1 | 75.0 % |" in text
    assert "| all | 6 | 1 | 4 | 1 | 80.0 % |" in text
    assert sum(line.startswith("- survived") for line in text) == 1
    assert any(line.endswith("there is nothing to see") for line in text)


def test_a_log_goes_on_where_it_was_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, source = tmp_path / "log", "cram/atomic.py"
    name = next(each.name for each in plan.draw(source, 8, 0) if not reason(each.name))
    lines = [json.dumps(row(source, status, name)) for status in ("survived", "killed")]
    log.write_text("\n".join([*lines, '{"source": "cra']))
    assert [each["status"] for each in plan.newest(plan.read(log))] == ["killed"]
    assert mutants.main(["--table", "--log", str(log)]) == 0
    log.write_text(lines[0] + "\n")
    assert mutants.main(["--table", "--log", str(log)]) == 1
    assert "survived: `cram/atomic.py:3`" in capsys.readouterr().out
    gone = [row(source, "survived", f"{name} once"), row("cram/gone.py", "survived", name)]
    log.write_text("".join(json.dumps(each) + "\n" for each in gone))
    assert mutants.main(["--table", "--log", str(log)]) == 0, "sources have no such mutants any more"
