"""The adapted layer of every registered method against CRAM's at equal total rank.

    python -m benchmarks methods                 D 2048 on the CPU
    python -m benchmarks methods --toy           tiny shapes: whether it runs, not how fast

Every method begins and ends its tasks as in training, but without data. Three kinds of calls are timed:

* training step: the last task is in training. A module runs one sample forward and backward, with dropout,
  and with the gradients of its input and of all trained values;
* prompt: all tasks have ended. A module runs the prompt of one sample;
* decode step: a module runs one more token of each of several samples, under the gates of their prompts.

All methods share the weights of the base. They take turns on several modules, so no call finds its data in
the cache. The time does not include routing outside of the layer.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine, markdown
from benchmarks.cases import DTYPES, QUERY_WIDTH
from benchmarks.models import Size, random_llava, shared_copy
from benchmarks.report import duration
from benchmarks.timing import Limits, Step, interleaved, sampler

TASKS, ROWS, STEPS = 6, 9, 4
# Kind -> tokens of a call. A decode step has one token per sample.
CASES = {"train": (8, 64, 1024), "prompt": (64, 1024), "decode": (1, 8)}
PROMPT = 4  # tokens of the prompts that a decode step continues
GOAL = 1.3
LEAST_TRAINED = 64  # tokens; smaller training steps are shown, but no real step is so small
PROJECTION = "o_proj"  # alone: q, k and v would share what they compute
SHAPES = {
    "full": Size(2048, 4, 16, 64, (32, 2, 28), 512),
    "toy": Size(64, 2, 2, 96, (32, 2, 28), 512),
}


def equal_rank_config(method: str) -> Any:
    """A configuration at which the method's experts have about TASKS * ROWS rows in every module."""
    from cram import CramConfig
    from cram.compare.entries import BUDGETS
    from cram.methods import METHODS

    rank = BUDGETS[METHODS[method].budget].rank(ROWS, TASKS, TASKS * ROWS)
    fields = {"rank": rank, "rank_min": rank, "rank_max": rank, "buffer_rank": max(48, rank), "max_groups": 1}
    return CramConfig(method=method, target_projections=(PROJECTION,), **fields)


def grown(base: Any, method: str, device: torch.device) -> Any:
    """A model on the base's weights. Its method has learnt all tasks but the last, which is in training."""
    from cram import attach
    from cram.routing.query import Query

    model = shared_copy(base)
    dims = {"image_dim": QUERY_WIDTH, "text_dim": QUERY_WIDTH}
    encoder = SimpleNamespace(**dims, reuses_vision_tower=False)
    handle = attach(model, equal_rank_config(method), encoder)
    torch.manual_seed(0)
    for task in range(TASKS):
        handle.method.begin_task(f"task{task}", STEPS)
        for step in range(STEPS):
            handle.method.before_step(step)
            features = torch.randn(2, 2, QUERY_WIDTH, device=device) / QUERY_WIDTH**0.5
            query = Query(features[0], features[1], torch.ones(2, dtype=torch.bool, device=device))
            if handle.method.uses_queries:
                handle.method.observe(query)
        if task < TASKS - 1:
            handle.method.end_task()
    return model


def make_route(model: Any, samples: int, training: bool) -> Any:
    """The method's route of a number of samples. Its gates are a leaf of autograd."""
    from cram.routing.query import Query, Route

    handle, device = model.cram, model.device
    method = handle.method
    features = torch.randn(2, samples, QUERY_WIDTH, device=device) / QUERY_WIDTH**0.5
    query = Query(features[0], features[1], torch.ones(samples, dtype=torch.bool, device=device))
    if method.told_task:
        gates = method.gates(f"task{TASKS - 1}").expand(handle.num_layers, samples, -1)
        route = Route(gates, overrides_gating=True)
    else:
        route = method.route(query, training)
    gates = route.gates.detach().requires_grad_(route.gates.requires_grad)
    return replace(route, gates=gates)


def layer_steps(model: Any, kind: str, tokens: int, dtype: torch.dtype) -> list[Step]:
    """A call of a kind on each module of the model."""
    from cram.model.state import ForwardState

    training, samples = kind == "train", tokens if kind == "decode" else 1
    model.train(training)
    modules = list(model.cram.modules.values())
    current = modules[0].current  # all modules share it

    def draw(module: Any, length: int) -> Tensor:
        return torch.randn(samples, length, module.in_features, device=model.device).to(dtype)

    current.state = ForwardState(make_route(model, samples, training), model.device)
    if kind == "decode":
        for module in modules:
            _inference(module, draw(module, PROMPT))()
        current.state = current.state.continued()
    made = []
    for module in modules:
        x = draw(module, tokens // samples)
        made.append(_training(module, x.requires_grad_()) if training else _inference(module, x))
    return made


def _inference(module: Any, x: Tensor) -> Step:
    def step() -> Tensor:
        with torch.no_grad():
            return module(x)

    return step


def _training(module: Any, x: Tensor) -> Step:
    gating = [] if module.gating is None else [p for p in module.gating.parameters() if p.requires_grad]
    leaves = [x, *module.trainable(), *gating]
    dy = torch.randn(1, x.shape[1], module.out_features, device=x.device).to(x.dtype)
    return lambda: torch.autograd.grad(module(x), leaves, dy, allow_unused=True)


def measure(
    size: Size, tokens: Mapping[str, Sequence[int]], dtype: str, device: torch.device, limits: Limits
) -> list[Any]:
    """Return one cell per case, with one row per method. CRAM's row comes first."""
    from cram.methods import METHODS

    base = random_llava(size, device, DTYPES[dtype], samples=1).model
    names = sorted(METHODS, key=lambda name: name != "cram")
    models = {name: grown(base, name, device) for name in names}
    cells = []
    for kind, count in [(kind, count) for kind, counts in tokens.items() for count in counts]:
        if kind == "prompt" and count == tokens[kind][0]:
            for model in models.values():
                model.cram.method.end_task()
        turns = itertools.count()
        samplers = {
            name: sampler(layer_steps(model, kind, count, DTYPES[dtype]), device, False, turns)
            for name, model in models.items()
        }
        times = interleaved(samplers, device, limits)
        rows = {
            name: {**asdict(time), "mode": "eager", "over_cram": time.median_us / times["cram"].median_us}
            for name, time in times.items()
        }
        case = {"op": kind, "hidden": size.hidden, "tokens": count, "dtype": dtype, "rows": TASKS * ROWS}
        name = f"methods/{kind}/D{size.hidden}/T{count}/{dtype}"
        cells.append({"name": name, "case": case, "segments": 1, "rows": rows})
        print(f"{name}  " + "  ".join(f"{n} {r['over_cram']:.2f}" for n, r in rows.items()), flush=True)
    return cells


def lines(results: dict[str, Any]) -> list[str]:
    """Return the page line by line."""
    environment, cells = results["environment"], results["cases"]
    names = list(cells[0]["rows"])
    real = [c for c in cells if c["case"]["op"] != "train" or c["case"]["tokens"] >= LEAST_TRAINED] or cells
    ratios = {name: max((cell["rows"][name]["over_cram"], cell["name"]) for cell in real) for name in names}
    worst = max(ratios, key=lambda name: ratios[name][0])
    value, where = ratios[worst]
    shown = [
        f"# Adapted layers of the methods, {environment['machine']}",
        "",
        f"About {TASKS * ROWS} rows of rank in each. {environment['cpu']}, {environment['threads']} threads; "
        f"commit {environment['commit']}, load {environment['load']} before and "
        f"{environment['load_after']} after. Medians, and the ratio to CRAM's.",
        "",
        f"Goal: at most {GOAL} x, in training from {LEAST_TRAINED} tokens on. Worst: {value:.2f} x, {worst}, "
        f"{where}: {'holds' if value <= GOAL else '**missed**'}.",
        "",
    ]
    rows = []
    for cell in cells:
        found = [f"{duration(row['median_us'])} ({row['over_cram']:.2f})" for row in cell["rows"].values()]
        rows.append([cell["name"].removeprefix("methods/"), *found])
    return shown + markdown.table(["case", *names], rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write methods.json and methods.md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks methods", description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="tiny shapes: whether it runs, not how fast")
    parser.add_argument("--dtype", default="float32", choices=sorted(DTYPES))
    parser.add_argument("--seconds", type=float, default=1.0, help="for each method and case")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: by machine)")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    out = arguments.out or machine.results_folder() / machine.machine_name(device)
    out.mkdir(parents=True, exist_ok=True)
    suite = "toy" if arguments.toy else "full"
    environment = machine.environment(device)
    limits = Limits(0.0, 2, 2) if arguments.toy else Limits(arguments.seconds, 7, 60)
    tokens = {kind: counts[: 1 if arguments.toy else None] for kind, counts in CASES.items()}
    cells = measure(SHAPES[suite], tokens, arguments.dtype, device, limits)
    environment["load_after"] = machine.load()
    results = {"suite": f"methods {suite}", "environment": environment, "cases": cells, "left_out": []}
    (out / "methods.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "methods.md").write_text("\n".join(lines(results)) + "\n")
    print("\n".join(lines(results)))
    return 0
