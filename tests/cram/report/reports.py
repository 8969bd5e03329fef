"""Made-up reports that follow the schema."""

from __future__ import annotations

import copy
from typing import Any

from cram.scoring.continual import continual_metrics

TASKS = ["colour-ring", "count", "spell"]
MATRICES = {
    "cram": [[90.0], [88.0, 92.0], [86.0, 90.0, 94.0]],
    "sequential": [[90.0], [40.0, 92.0], [10.0, 30.0, 94.0]],
    "isolated": [[90.0], [90.0, 92.0], [90.0, 92.0, 96.0]],
}
ENTRIES = ["cram", "alpha", "beta", "gamma", "isolated", "sequential", "cram: no penalty", "cram: odd"]


def method_report(name: str, shift: float = 0.0) -> dict[str, Any]:
    matrix = [[value + shift for value in row] for row in MATRICES[name]]
    method: dict[str, Any] = {
        "tasks": list(TASKS),
        "matrix": matrix,
        **continual_metrics(matrix).to_dict(),
        "parameters": {"total": 3000, "per_task": dict.fromkeys(TASKS, 1000)},
        "seconds": {"train": 30.0, "eval": 6.0, "per_task": dict.fromkeys(TASKS, 10.0)},
    }
    if name == "cram":
        modules = [f"model.language_model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qkvo"]
        method["ranks"] = {task: {m: 4 + k % 6 for k, m in enumerate(modules)} for task in TASKS}
        method["groups"] = {"colour-ring": 0, "count": 1, "spell": 0}
        method["routing"] = {task: routing(task) for task in TASKS}
    return method


def routing(task: str) -> dict[str, Any]:
    gates = {other: 0.8 if other == task else 0.1 for other in TASKS}
    return {"group_accuracy": 99.0, "expert_accuracy": 81.0, "mean_gates": gates, "gate_entropy": 0.42}


def single_seed() -> dict[str, Any]:
    return {"stream": "toy", "methods": {name: method_report(name) for name in MATRICES}}


def several_seeds() -> dict[str, Any]:
    seeds = {str(s): {name: method_report(name, shift=float(s)) for name in MATRICES} for s in range(3)}
    return copy.deepcopy({"stream": "toy", "seeds": seeds, "settings": {"note": "<b>plain</b>"}})


def comparison(seeds: int = 2) -> dict[str, Any]:
    """Six methods (the fifth is told the task) and two ablations; Last falls from method to method."""
    found = {
        str(seed): {name: _compared(name, place, seed) for place, name in enumerate(ENTRIES)}
        for seed in range(seeds)
    }
    settings = {"model": "toy", "clip": None, "jobs": 2, "config": {"max_steps": 40, "batch_size": 16}}
    return copy.deepcopy({"stream": "toy", "seeds": found, "settings": settings})


def _compared(name: str, place: int, seed: int) -> dict[str, Any]:
    method = method_report("isolated")
    rows = [[value - 5 * place + seed for value in row] for row in method["matrix"]]
    if place:
        rows[2][0] -= 10.0
    method.update(matrix=rows, **continual_metrics(rows).to_dict())
    method["parameters"]["total"] = 1000 * (place + 1)
    told = name == "isolated"
    entry = {"method": name.split(":")[0], "changes": {}, "told_task": told, "note": f"About {name}."}
    method["entry"] = entry
    method["stored"] = {"values": 1500 * (place + 1), "bundle_bytes": 2_500_000 * (place + 1)}
    if name == "alpha":
        method["kept_samples"] = 180
    method["inference"] = {"adapted": 1.1 + 0.2 * seed, "base": 1.0, "samples": 4, "tokens": 3}
    method["inference"]["prefills"] = 1.0 + place
    method["peak_memory_bytes"] = 1_250_000_000
    return method
