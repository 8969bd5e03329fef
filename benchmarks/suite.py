"""The main benchmark. Every case has the gate first, then the figures. Each case is written at once."""

from __future__ import annotations

import gc
import itertools
import json
import re
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import floors, machine, truth
from benchmarks.candidates import Candidate, taking_part
from benchmarks.cases import GATE_OPS, PART_OPS, SUITES, Case
from benchmarks.problem import Layer, Problem, make, rotation, smaller
from benchmarks.timing import Limits, Step, interleaved, sampler, seconds

# If a candidate raises one of these, the other candidates still get their figures.
FAILURES: tuple[type[BaseException], ...] = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    ImportError,
    OSError,
)
_TOY, _BRIEF, _LONG = Limits(0.0, 2, 2, sets=2), Limits(0.35, 7, 25), Limits(1.5, 7, 60)
LIMITS = {
    ("toy", "cpu"): _TOY,
    ("toy", "cuda"): _TOY,
    ("quick", "cpu"): _BRIEF,
    ("full", "cpu"): _LONG,
    ("quick", "cuda"): _BRIEF,
    # Device time is short and events resolve well. So there are more cases and fewer samples.
    ("full", "cuda"): Limits(0.15, 7, 40),
}
# A case is left out if its first candidate takes more than this many seconds per call. torch multiplies
# bfloat16 very slowly on processors without instructions for it.
LONGEST_CALL, PROBE_TOKENS = {"toy": 60.0, "quick": 2.0, "full": 1.5}, 64
# On a CPU the gate runs on fewer tokens, because float64 products of the full size would outlast the
# benchmark.
GATE_TOKENS = {"cpu": 64, "cuda": 8192}


@dataclass(frozen=True)
class Plan:
    """The settings of a run.

    Attributes:
        suite: toy, quick or full.
        device: The device of all tensors.
        out: Folder of the results.
        only: Regular expression searched in the cases' names.
        budget_seconds: No case begins after this time.
        resume: Go on from results of the same commit. A case that was interrupted counts as failed.
    """

    suite: str
    device: torch.device
    out: Path
    only: str = ""
    budget_seconds: float = float("inf")
    resume: bool = False


def run(plan: Plan) -> dict[str, Any]:
    """Measure, and return the content of results.json."""
    deadline = time.monotonic() + plan.budget_seconds
    chosen = [case for case in SUITES[plan.suite, plan.device.type] if re.search(plan.only, case.name)]
    if not chosen:
        raise ValueError(f"--only must match a case of suite {plan.suite!r}, got {plan.only!r}")
    results = _begin(plan)
    ceilings = floors.Ceilings(**results["ceilings"])
    done = {cell["name"] for cell in results["cases"]}
    if plan.device.type == "cuda":
        gc.freeze()  # objects loaded so far stay, so collections between cases can skip them
    for case in chosen:
        if case.name in done:
            continue
        if time.monotonic() > deadline:
            results["left_out"].append(f"{case.name}: out of time")
            continue
        results["under_way"] = case.name
        _write(plan.out, results)
        call = base_seconds(case, plan.device) if plan.device.type == "cpu" else 0.0
        if call > LONGEST_CALL[plan.suite]:
            results["left_out"].append(f"{case.name}: a call of the first candidate takes about {call:.0f} s")
            continue
        cell = measure(case, plan.device, LIMITS[plan.suite, plan.device.type], ceilings)
        results["cases"].append(cell)
        print(line(cell), flush=True)
    results["under_way"] = None
    results["environment"]["load_after"] = machine.load()
    _write(plan.out, results)
    return results


def _begin(plan: Plan) -> dict[str, Any]:
    file = plan.out / "results.json"
    if plan.resume and file.is_file():
        found: dict[str, Any] = json.loads(file.read_text())
        if found["suite"] == plan.suite and found["environment"]["commit"] == machine.commit():
            if found["under_way"]:
                reason = "the process ended while it was measured"
                found["cases"].append({"name": found["under_way"], "failed": reason, "rows": {}})
            return {**found, "left_out": []}
    measured = machine.ceilings(plan.device, small=plan.suite == "toy")
    return {
        "suite": plan.suite,
        "environment": machine.environment(plan.device),
        "ceilings": asdict(measured),
        "under_way": None,
        "left_out": [],
        "cases": [],
    }


def _write(folder: Path, results: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / "results.json.part"
    unfinished.write_text(json.dumps(results, indent=1) + "\n")
    unfinished.replace(folder / "results.json")


def base_seconds(case: Case, device: torch.device) -> float:
    """Return the estimated time of one call of the case's first candidate, from a call on a few tokens."""
    few = smaller(case, PROBE_TOKENS)
    problem = make(few, device)
    with torch.set_grad_enabled(case.training):
        call = step(problem, next(iter(taking_part(case.op).values())).build(problem))
        return seconds(call, 1, device) * case.tokens / few.tokens


def measure(
    case: Case,
    device: torch.device,
    limits: Limits,
    ceilings: floors.Ceilings,
    only: Collection[str] | None = None,
) -> dict[str, Any]:
    """Gate and time the candidates of one case. `only` names some of them; None takes all."""
    rows: dict[str, dict[str, Any]] = {}
    ready: dict[str, Candidate] = {}
    torch.compiler.reset()  # compiled code belongs to one case; the next case must not count as a recompile
    gate = make(smaller(case, GATE_TOKENS[device.type]), device, seed=1)
    expected: dict[truth.Truth, dict[str, torch.Tensor]] = {}
    for name, candidate in taking_part(case.op).items():
        if only is not None and name not in only:
            continue
        reason = candidate.missing(case, device)
        if reason is not None:
            rows[name] = {"skipped": reason}
            continue
        with _recorded(rows, name):
            if candidate.truth not in expected:
                expected[candidate.truth] = candidate.truth(gate)
            rows[name] = {"error": passed(candidate, gate, expected[candidate.truth])}
            ready[name] = candidate
    del gate, expected
    problems = rotation(case, device, machine.cache_bytes(device), limits.sets)
    samplers, turns = {}, itertools.count()
    with torch.set_grad_enabled(case.training):
        for name, candidate in ready.items():
            with _recorded(rows, name):
                layers = [candidate.build(problem) for problem in problems]
                rows[name].update(costs(problems[0], layers[0], ceilings, name))
                steps = [step(p, layer) for p, layer in zip(problems, layers, strict=True)]
                samplers[name] = sampler(steps, device, candidate.captured, turns)
                rows[name]["mode"] = samplers[name].mode
        for name, timing in interleaved(samplers, device, limits).items():
            rows[name].update(asdict(timing))
    del samplers, problems
    _release(device)
    return {"name": case.name, "case": asdict(case), "segments": case.segments, "rows": rows}


def passed(candidate: Candidate, gate: Problem, expected: dict[str, torch.Tensor] | None = None) -> float:
    """Return the candidate's error on a problem. Raise if the error is too large."""
    actual = truth.results(gate, candidate.build(gate))
    return truth.error(actual, expected or candidate.truth(gate), truth.LIMITS[gate.case.dtype])


def step(p: Problem, layer: Layer) -> Step:
    """Return the timed function: the forward, and in training the gradients of all leaves."""
    if not p.case.training:
        return layer.forward
    leaves = tuple(layer.leaves.values())
    return lambda: torch.autograd.grad(layer.forward(), leaves, p.gradients)


def costs(p: Problem, layer: Layer, ceilings: floors.Ceilings, name: str) -> dict[str, Any]:
    """Return a candidate's floor, the bytes it keeps for backward and its peak of memory."""
    case = p.case
    work = floors.base_phases(case) if name == "base" else floors.phases(case)
    found: dict[str, Any] = {"floor_us": ceilings.floor_us(work, case.dtype)}
    if case.training and case.op not in GATE_OPS:
        found["saved_bytes"] = saved_bytes(p, layer)
    if p.x.device.type == "cuda" and case.op not in PART_OPS:
        found["peak_bytes"] = _peak_bytes(step(p, layer))
    return found


def saved_bytes(p: Problem, layer: Layer) -> int:
    """Return the bytes that autograd keeps between forward and backward, without weights and experts."""
    constant = [t for one in p.stack for t in (one.weight, one.bias, *one.a, *one.b)]
    constant += [p.packed_a, p.packed_bt, *(t for n, t in layer.leaves.items() if n not in ("x", "gates"))]
    known = {t.untyped_storage().data_ptr() for t in constant if t is not None}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer.forward()
    del y
    return sum(kept.values())


def _peak_bytes(once: Step) -> int:
    once()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    once()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


@contextmanager
def _recorded(rows: dict[str, dict[str, Any]], name: str) -> Iterator[None]:
    """Write the failure of a candidate into the candidate's row."""
    try:
        yield
    except failures() as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        rows[name] = {"failed": f"{type(error).__name__}: {first[:200]}"}


def failures() -> tuple[type[BaseException], ...]:
    """Return the errors that a candidate may raise. If Triton is installed, its errors are among them."""
    try:
        from triton.errors import TritonError
    except ImportError:
        return FAILURES
    return (*FAILURES, TritonError)


def line(cell: dict[str, Any]) -> str:
    """One case on one line: the median of each candidate, failures by name."""
    shown = [cell["name"]]
    for name, row in cell["rows"].items():
        if "median_us" in row:
            shown.append(f"{name} {row['median_us']:.4g}")
        elif "failed" in row:
            shown.append(f"{name} FAILED ({row['failed']})")
    return "  ".join([*shown, *([cell["failed"]] if "failed" in cell else [])])
