"""Goals, tables and comparisons, from made-up figures."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from benchmarks import goals, report, timing
from benchmarks.cases import Case


def cell(tokens: int, op: str = "decode", model: str = "LLaVA-1.5-7B", **times: float) -> dict[str, Any]:
    """One measured case; a keyword's underscores are spaces."""
    case = Case(op, model, "q", "trigap", tokens, tokens, "bfloat16")
    rows: dict[str, Any] = {
        name.replace("_", " "): {"median_us": us, "floor_us": us / 2, "mode": "graph"}
        for name, us in times.items()
    }
    return {"name": case.name, "case": vars(case), "rows": rows}


def results(*cells: dict[str, Any], device: str = "cpu") -> dict[str, Any]:
    """A run with these cells."""
    return {
        "suite": "full",
        "environment": {
            "machine": "some-machine",
            "device": device,
            "cpu": "some processor",
            "instructions": "AVX2",
            "threads": 2,
            "python": "3.11",
            "packages": {"torch": "2.13", "triton": None},
            "commit": "abc",
            "load": 0.1,
        },
        "ceilings": {"bytes_per_us": 1e4, "flops_per_us": {"bfloat16": 1e6}},
        "cases": list(cells),
        "left_out": ["late/case: out of time"],
    }


def test_a_goal_is_judged_at_its_worst_cell() -> None:
    run = results(
        cell(1, base=100, cram_cpu=104, released=150), cell(8, base=100, cram_cpu=112, released=500)
    )
    found = {goal.text: goal for goal in goals.checked(run)}
    share = found["decode adds little at D 4096"]
    assert (share.found, share.holds, share.where) == ("12.0%", False, f"{run['cases'][1]['name']} (2 cells)")
    less = found["adds less than the released loop, T to 64"]
    assert less.found == "12.5 x less" and less.holds
    assert "training step over the base's, T 1024" not in found


def test_what_adds_nothing_adds_less() -> None:
    run = results(cell(1, base=100, cram_cpu=40, released=101), cell(8, base=100, cram_cpu=110, released=160))
    found = {goal.text: goal for goal in goals.checked(run)}
    less = found["adds less than the released loop, T to 64"]
    assert less.found == "6.0 x less" and less.holds and less.where.startswith(run["cases"][1]["name"])
    (less,) = [goal for goal in goals.checked(results(run["cases"][0])) if "released" in goal.text]
    assert less.found == "nothing added" and less.holds


def test_goals_take_the_implementation_that_auto_takes() -> None:
    both = cell(1, base=100, cram_cpu=150, cram_native=101)
    assert goals.ours(both, "cpu") == "cram native"
    assert goals.ours(cell(1, base=100, cram_cpu=150), "cpu") == "cram cpu"
    assert goals.ours(cell(1, op="shrink", matmul=3, triton=2), "cuda") == "triton"


def test_goals_of_another_device_or_of_toys_are_not_judged() -> None:
    assert not goals.checked(results(cell(16, base=100, cram_triton=150), device="cuda"))[0].holds
    assert not goals.checked(results(cell(1, model="toy", base=100, cram_cpu=150)))


def test_bandwidth_goal_wants_at_least() -> None:
    run = results(cell(8192, op="shrink", matmul=3, triton=2), device="cuda")
    (share,) = goals.checked(run)
    assert (share.found, share.wanted, share.holds) == ("50%", "at least 80%", False)


def test_table_has_figures_failures_and_what_was_left_out() -> None:
    broken = cell(1, base=100, cram_cpu=104)
    broken["rows"]["peft"] = {"failed": "RuntimeError: no"}
    eager = cell(8, base=2000, cram_cpu=3000)
    eager["rows"]["cram cpu"]["mode"] = "eager"
    text = "\n".join(report.lines(results(broken, eager)))
    assert "| 100 µs | 104 µs (+4%) |" in text and "| 2 ms | 3 ms* (+50%) |" in text
    assert (
        f"- {broken['name']}, peft: RuntimeError: no" in text
        and "- not begun: late/case: out of time" in text
    )
    assert "| decode adds little at D 4096 | at most 10.0% | 50.0% |" in text


def test_distance_from_committed_results() -> None:
    before, after = results(cell(1, base=100, cram_cpu=200)), results(cell(1, base=110, cram_cpu=300))
    text = "\n".join(report.lines(after, before))
    assert "(of abc): 2 figures in common, time ratio 1.50 (median), 1.10 to 1.50 over all." in text
    assert "No figure in common" in "\n".join(report.lines(after, results()))


@pytest.mark.parametrize(
    ("before", "after", "device", "busy"),
    [(0.1, 2.3, "cpu", False), (1.5, 2.0, "cpu", True), (0.1, 3.4, "cpu", True), (9.0, 9.0, "cuda", False)],
)
def test_a_busy_machine_is_named(before: float, after: float, device: str, busy: bool) -> None:
    run = results(cell(1, base=100, cram_cpu=104), device=device)
    run["environment"] |= {"load": before, "load_after": after, "gpu": {"name": "some card"}}
    assert ("not for publication" in "\n".join(report.lines(run))) == busy


def test_compact_lines_are_short() -> None:
    shown = report.compact(results(cell(1, base=100, cram_cpu=104, released=300, loop=200)))
    assert f"{cell(1)['name']}  | 100 µs | cram cpu +4% | released +200%" in shown
    assert shown[-1] == "not begun: late/case: out of time"


def test_interleaving_gives_every_candidate_the_same_samples() -> None:
    calls: list[str] = []
    samplers = {n: timing.Sampler(lambda n=n: calls.append(n), 2, "eager") for n in ("a", "b")}
    found = timing.interleaved(samplers, torch.device("cpu"), timing.Limits(0.0, 3, 9))
    assert {name: summary.samples for name, summary in found.items()} == {"a": 3, "b": 3}
    assert all(0 < summary.median_us < 1e4 for summary in found.values())


def test_times_are_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    # One run of one call takes 400 us, whatever the candidate; every third sample takes twice as long.
    counted = iter(range(10**6))
    monkeypatch.setattr(
        timing, "seconds", lambda run, repeats, device: repeats * 4e-4 * (1 + (next(counted) % 3 == 0))
    )
    samplers = {"a": timing.Sampler(lambda: None, 4, "eager")}
    found = timing.interleaved(samplers, torch.device("cpu"), timing.Limits(0.0, 9, 9))["a"]
    assert (round(found.median_us), round(found.low_us), round(found.high_us)) == (100, 100, 200)


def test_steps_are_walked_in_turn() -> None:
    seen: list[int] = []
    made = timing.sampler([lambda i=i: seen.append(i) for i in range(4)], torch.device("cpu"), captured=True)
    assert made.mode == "eager" and seen == [0, 1, 2, 3]
    for _ in range(5):
        made.run()
    assert seen[4:] == [0, 1, 2, 3, 0]


@pytest.mark.parametrize(
    ("us", "shown"), [(0.123, "0.123 µs"), (1234.0, "1.23 ms"), (56.78, "56.8 µs"), (2.5e6, "2.5 s")]
)
def test_duration(us: float, shown: str) -> None:
    assert report.duration(us) == shown


def test_candidates_that_share_the_sets_walk_them_together() -> None:
    seen: list[tuple[str, int]] = []
    turns, device = itertools.count(), torch.device("cpu")
    made = [
        timing.sampler([lambda n=n, i=i: seen.append((n, i)) for i in range(3)], device, False, turns)
        for n in "ab"
    ]
    seen.clear()
    for _ in range(3):
        for each in made:
            each.run()
    assert [index for _, index in seen] == [0, 1, 2, 0, 1, 2]
