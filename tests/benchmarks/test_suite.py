"""The whole path at toy size: gate, timing, results, table, plots; and what happens when something fails."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import candidates, floors, parts, suite
from benchmarks.__main__ import main
from benchmarks.baselines import linear, loops
from benchmarks.cases import GATE_OPS, MODELS, PART_OPS, SUITES, Case
from benchmarks.problem import Layer, Problem, make
from benchmarks.suite import Plan

CPU = torch.device("cpu")
TOY = suite.LIMITS["toy", "cpu"]
CASE = Case("decode", "toy", "q", "toy", 8, 8, "float32")


def test_one_command_measures_and_reports(tmp_path: Path) -> None:
    assert main(["--toy", "--device", "cpu", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert [cell["name"] for cell in results["cases"]] == [case.name for case in SUITES["toy", "cpu"]]
    assert results["under_way"] is None and not results["left_out"]
    for cell in results["cases"]:
        assert not [row for row in cell["rows"].values() if "failed" in row], cell["name"]
        timed = [row for row in cell["rows"].values() if "median_us" in row]
        assert timed and all(0 < row["low_us"] <= row["median_us"] <= row["high_us"] for row in timed)
    table = (tmp_path / "table.md").read_text()
    assert "## Training step" in table and "| released |" in table and "cram cpu stacked" in table
    for picture in ("ratios.png", "roofline.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("suite_name", sorted(SUITES), ids="-".join)
def test_grids_name_real_shapes_once(suite_name: tuple[str, str]) -> None:
    cases = SUITES[suite_name]
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert case.tokens % case.segments == 0
        widths = [] if case.op in GATE_OPS else [MODELS[case.model].linear(p) for p in case.projections]
        assert all(d_in % 16 == d_out % 16 == 0 for d_in, d_out, _ in widths)


def _without_last(p: Problem) -> Layer:
    return loops.loop(replace(p, b=(*p.b[:-1], torch.zeros_like(p.b[-1]))))


def _shifted_gates(p: Problem) -> Layer:
    return loops.loop(replace(p, gates=p.gates.roll(1, 1)))


def _not_a_number(p: Problem) -> Layer:
    return Layer(lambda: linear.base(p).forward() * torch.nan, {})


def _raises(p: Problem) -> Layer:
    raise NotImplementedError("no such kernel\nsecond line")


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (_without_last, "Wrong: y must be within 0.0001 of the truth, got"),
        (_shifted_gates, "Wrong: y must be within 0.0001 of the truth, got"),
        (_not_a_number, "Wrong: y must be within 0.0001 of the truth, got nan"),
        (_raises, "NotImplementedError: no such kernel"),
    ],
)
def test_a_wrong_candidate_gets_no_figure(monkeypatch: pytest.MonkeyPatch, build: Any, reason: str) -> None:
    monkeypatch.setitem(candidates.CANDIDATES, "wrong", candidates.Candidate(build))
    rows = suite.measure(CASE, CPU, TOY, _ceilings())["rows"]
    assert rows["wrong"]["failed"].startswith(reason) and list(rows["wrong"]) == ["failed"]
    assert "second line" not in rows["wrong"]["failed"]
    assert "median_us" in rows["loop"]


def test_a_wrong_gradient_gets_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    def detached(p: Problem) -> Layer:
        layer = loops.loop(p)
        x = layer.leaves["x"]
        return Layer(lambda: layer.forward() + x * 0.1, layer.leaves)

    monkeypatch.setitem(candidates.CANDIDATES, "wrong", candidates.Candidate(detached))
    rows = suite.measure(replace(CASE, op="train"), CPU, TOY, _ceilings())["rows"]
    assert "Wrong" in rows["wrong"]["failed"]


def _ceilings() -> suite.floors.Ceilings:
    return suite.floors.Ceilings(1e4, {"float32": 1e5, "bfloat16": 1e5})


def test_resuming_skips_what_is_done_and_records_what_broke(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [case.name for case in SUITES["toy", "cpu"]][:3]
    plan = Plan("toy", CPU, tmp_path, only="|".join(names))
    measured: list[str] = []

    def broken(case: Case, *_: Any) -> dict[str, Any]:
        measured.append(case.name)
        if case.name == names[1] and measured.count(case.name) == 1:
            raise SystemExit("killed")
        return {"name": case.name, "case": vars(case), "rows": {}}

    monkeypatch.setattr(suite, "measure", broken)
    with pytest.raises(SystemExit):
        suite.run(plan)
    results = suite.run(replace(plan, resume=True))
    assert measured == [names[0], names[1], names[2]]
    assert [cell["name"] for cell in results["cases"]] == names
    assert "process ended" in results["cases"][1]["failed"]


def test_out_of_time_is_listed(tmp_path: Path) -> None:
    results = suite.run(Plan("toy", CPU, tmp_path, only="gates/", budget_seconds=-1.0))
    assert results["left_out"] == ["gates/toy/toy/T3/float32: out of time"] and not results["cases"]


def test_a_case_whose_calls_take_too_long_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(suite.LONGEST_CALL, "toy", 0.0)
    results = suite.run(Plan("toy", CPU, tmp_path, only="gates/"))
    (reason,) = results["left_out"]
    assert reason.startswith("gates/toy/toy/T3/float32: a call of the first candidate takes about 0 s")
    assert not results["cases"]


def test_unknown_case_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--only must match a case of suite 'toy', got 'nothing'"):
        suite.run(Plan("toy", CPU, tmp_path, only="nothing"))


def test_saved_bytes_count_what_backward_keeps() -> None:
    p = make(replace(CASE, op="train"), CPU)
    found = {
        n: suite.saved_bytes(p, c.build(p)) for n, c in candidates.taking_part("train").items() if n in KEPT
    }
    assert found == {name: KEPT[name](p) for name in found} and len(found) == len(KEPT)


def _kept_by_cpu(p: Problem) -> int:
    """x, Z, the gates and which expert owns each row."""
    return p.x.nbytes + 4 * p.case.tokens * len(p.packed_a) + p.gates.nbytes + 8 * len(p.packed_a)


KEPT = {"base": lambda p: 0, "cram cpu": _kept_by_cpu}


@pytest.mark.parametrize("op", ["train", "routed", "stacked-train", *GATE_OPS, *PART_OPS])
def test_every_candidate_that_runs_here_is_right(op: str) -> None:
    projection = "" if op in GATE_OPS else "q+k+v" if "stacked" in op else "k"
    case = Case(op, "toy", projection, "toy", 24, 24 if op in GATE_OPS else 3, "float32")
    gate = make(case, CPU, seed=5)
    ran = [
        suite.passed(candidate, gate)
        for candidate in candidates.taking_part(op).values()
        if candidate.missing(case, CPU) is None
    ]
    assert ran and max(ran) < 1e-5


@pytest.mark.parametrize("op", PART_OPS)
def test_floor_of_a_part_counts_no_partial_sums(op: str) -> None:
    """Planes of a split sum are a kernel's own choice: the floor is the same for every tile."""
    tiles = pytest.importorskip("cram_kernels.expert_lora.tiles")
    case = Case(op, "toy", "q", "toy", 32, 1, "float32")
    problem, ceilings = make(case, CPU), floors.Ceilings(4.0, {"float32": 1e9})
    shipped = parts.shipped_tile(problem)
    split = {tiles.ShrinkTile: "split_k", tiles.GramTile: "split_t"}.get(type(shipped))
    for tile in [shipped, *([replace(shipped, **{split: 4})] if split else [])]:
        found = suite.costs(problem, parts.triton_part(problem, tile), ceilings, "triton")
        assert found["floor_us"] == ceilings.floor_us(floors.expert_phases(case), "float32")


def test_a_case_without_a_right_candidate_has_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    only = {"broken": candidates.Candidate(_raises)}
    monkeypatch.setattr(suite, "taking_part", lambda op: only)
    cell = suite.measure(CASE, CPU, TOY, floors.Ceilings(1.0, {"float32": 1.0}))
    assert list(cell["rows"]) == ["broken"] and list(cell["rows"]["broken"]) == ["failed"]
