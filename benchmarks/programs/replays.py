"""Whether the layer's launches, captured once and replayed on new inputs, give the right values every time.

A kernel that may start before the one in front has ended, and that reads too early, finds what the previous
replay wrote. Replays on the same inputs hide it, and eager calls are too slow to show it. Here the inputs
change before every replay, a graph holds two calls that share their temporary memory, and every output is
compared with float64. Without a CUDA device the calls are eager, under Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine, ours, truth
from benchmarks.cases import Case
from benchmarks.problem import Layer, Problem, make

CALLS = 2  # in one graph
TOKENS = (1, 16, 64)
# Kind -> operation and linears of the case, the layer, the truth.
KINDS: dict[str, tuple[str, str, Callable[..., Layer], truth.Truth]] = {
    "expert_lora": ("decode", "q", ours.two_ops, truth.experts),
    "stacked_expert_lora": ("stacked", "q+k+v", ours.one_stack, truth.stacked(truth.experts)),
    "routed_expert_lora": ("routed", "q", ours.one_op, truth.experts),
}
SIZES = {"full": ("LLaVA-1.5-7B", "trigap", "bfloat16"), "toy": ("toy", "toy", "float32")}


def problems(kind: str, size: str, tokens: int, device: torch.device) -> list[Problem]:
    """Return the calls of one graph."""
    operation, projection, _, _ = KINDS[kind]
    model, stream, dtype = SIZES[size]
    case = Case(operation, model, projection, stream, tokens, tokens, dtype)
    return [make(case, device, seed) for seed in range(CALLS)]


def calls(device: torch.device) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield every kind and size, each with a call that launches its kernels."""
    for kind, (_, _, build, _) in KINDS.items():
        for tokens in TOKENS:
            (p, *_) = problems(kind, "full", tokens, device)
            yield f"replays {kind} T{tokens}", torch.no_grad()(build(p, impl="triton").forward)


def renew(p: Problem) -> None:
    """Draw new inputs in place: x, gates and the query that routes."""
    p.x.normal_()
    p.gates.copy_(torch.randn_like(p.gates).softmax(-1))
    p.query.normal_().div_(p.query.shape[-1] ** 0.5)


def measure(
    kind: str, size: str, tokens: int, device: torch.device, replays: int, deadline: float
) -> dict[str, Any]:
    """Replay on new inputs; return how many replays were wrong, and the largest error of a right one."""
    _, _, build, expected = KINDS[kind]
    chosen = problems(kind, size, tokens, device)
    layers = [build(p, impl="triton") for p in chosen]
    replay = captured([layer.forward for layer in layers], device)
    done, wrong, largest = 0, 0, 0.0
    for done in range(1, replays + 1):  # noqa: B007 - read after the loop
        for p in chosen:
            renew(p)
        _wait(device)
        outputs = replay()
        _wait(device)
        try:
            for p, y in zip(chosen, outputs, strict=True):
                found = {"y": y if isinstance(y, Tensor) else torch.cat(y, -1)}
                error = truth.error(found, expected(p), truth.LIMITS[p.case.dtype])
                largest = max(largest, error)
        except truth.Wrong:
            wrong += 1
        if time.monotonic() > deadline:
            break
    return {"kind": kind, "tokens": tokens, "wrong": wrong, "of": done, "largest_error": largest}


def captured(steps: Sequence[Callable[[], Any]], device: torch.device) -> Callable[[], list[Any]]:
    """Return what replays the steps on their inputs' new values; on a CPU it calls them."""
    steps = [torch.no_grad()(step) for step in steps]
    if device.type != "cuda":
        return lambda: [step() for step in steps]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in steps:
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [step() for step in steps]

    def replay() -> list[Any]:
        graph.replay()
        return outputs

    return replay


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main(argv: Sequence[str] | None = None) -> int:
    """Replay everything; writes replays.json; returns 1 if a replay was wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks replays", description=__doc__.splitlines()[0])
    parser.add_argument("--replays", type=int, default=200, help="of each kind and size (default: 200)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--toy", action="store_true", help="tiny shapes: whether it runs")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of replays.json")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    deadline = time.monotonic() + arguments.seconds
    found: dict[str, Any] = {"environment": machine.environment(device), "rows": []}
    arguments.out.mkdir(parents=True, exist_ok=True)
    size, sizes = ("toy", TOKENS[1:2]) if arguments.toy else ("full", TOKENS)
    for kind, tokens in product(KINDS, sizes):
        if time.monotonic() > deadline:
            break
        row = measure(kind, size, tokens, device, arguments.replays, deadline)
        found["rows"].append(row)
        (arguments.out / "replays.json").write_text(json.dumps(found, indent=1) + "\n")
        print(f"{kind} T {tokens}: {row['wrong']} wrong replays of {row['of']}", flush=True)
    return int(any(row["wrong"] for row in found["rows"]))


if __name__ == "__main__":
    raise SystemExit(main())
