"""The server under load: latencies and throughput with experts, against the bare model and PEFT.

    python -m benchmarks serve                   all parts
    python -m benchmarks serve --parts token     one part; the results of the others stay

Parts:

    token        time per token of one client: bare, base model and experts in one server, six experts
    throughput   tokens per second of 8 clients and of one, and without a server: PEFT's `adapter_names` in
                 batches of 8, and the bare model's forwards alone, which no server can pass
    growth       time per token with 10 and 1000 experts and a `gate_floor`
    prefill      time to first token of a short prompt, alone and while a 1,500-token prompt is read
    open         a Poisson process of mixed requests at several rates, with and without experts

Every server is a process of its own and has all its load from this one. Requests of a part that compares
servers alternate between them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import load, machine, markdown, offline
from benchmarks.cases import DTYPES
from benchmarks.served import NEAR, SHAPES, Shape, Variant, body, servers

FLOOR = 0.01
WORDS = ("what", "colour", "is", "the", "thing", "on", "left", "of", "this", "picture", "and", "how", "many")
LONG_WORDS, ANSWER_TOKENS = 930, 32  # 930 words are 1,500 tokens of the shipped tokenizer
RATES = (0.3, 0.6, 0.9, 1.2)
EXPERTS = Variant(NEAR)
BARE = Variant(0)


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        shape: The random LLaVA.
        dtype: Its dtype.
        threads: Threads of a server.
        seconds: Length of each measurement, where it is one of time.
        requests: Requests of each measurement, where it is one of number.
    """

    shape: Shape
    dtype: torch.dtype
    threads: int
    seconds: float
    requests: int


def question(words: int, seed: int) -> str:
    """So many words."""
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def mixed(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Requests about all pictures, with questions and answers of several lengths."""
    generator = random.Random(seed)
    return [
        body(
            question(generator.choice((4, 12, 40)), index),
            [index % NEAR],
            max_tokens=generator.choice((8, 16, 32, 48)),
        )
        for index in range(count)
    ]


def alternating(targets: dict[str, tuple[int, dict[str, Any]]], requests: int) -> dict[str, list[load.Heard]]:
    """The same question to several (port, fields), in turn; what was heard by target."""

    async def run() -> dict[str, list[load.Heard]]:
        heard: dict[str, list[load.Heard]] = {name: [] for name in targets}
        for turn in range(requests + 1):
            for name, (port, fields) in targets.items():
                found = await load.ask(port, body(question(12, turn), [turn % NEAR], **fields))
                if turn:  # The first one warms up.
                    heard[name].append(found)
        return heard

    return asyncio.run(run())


def token(plan: Plan) -> dict[str, Any]:
    """Time per token of one client."""
    with servers(plan.shape, plan.dtype, {"bare": BARE, "experts": EXPERTS}, plan.threads) as ports:
        targets = {
            "bare model": (ports["bare"], {"max_tokens": ANSWER_TOKENS}),
            "base in the experts' server": (ports["experts"], {"max_tokens": ANSWER_TOKENS, "model": "base"}),
            f"{NEAR} experts": (ports["experts"], {"max_tokens": ANSWER_TOKENS}),
        }
        heard = alternating(targets, plan.requests)
    return {name: load.summary(each) for name, each in heard.items()}


def throughput(plan: Plan) -> dict[str, Any]:
    """Tokens per second of 8 clients and of one."""
    bodies = mixed(4 * plan.requests)
    found: dict[str, Any] = {}
    with servers(plan.shape, plan.dtype, {"bare": BARE, "experts": EXPERTS}, plan.threads) as ports:
        for name, port in ports.items():
            asyncio.run(load.closed(port, bodies[:3], 3))
            for clients in (1, 8):
                few = bodies if clients > 1 else bodies[: len(bodies) // 2]
                heard = asyncio.run(load.closed(port, few, clients))
                found[f"{name}, {clients} client{'s' * (clients > 1)}"] = load.summary(heard)
    peft = offline.apart(offline.adapter_names, plan.threads, plan.shape, plan.dtype, bodies, 8)
    one, eight = offline.apart(offline.forwards, plan.threads, plan.shape, plan.dtype, bodies, (1, 8))
    return {
        **found,
        "PEFT adapter_names, 8 rows": peft,
        "bare forwards alone, 1 row": one,
        "bare forwards alone, 8 rows": eight,
    }


def growth(plan: Plan) -> dict[str, Any]:
    """Time per token with many experts."""
    variants = {
        "10 experts": Variant(10, FLOOR),
        "1000 experts": Variant(1000, FLOOR),
        "1000 experts, no floor": Variant(1000),
    }
    with servers(plan.shape, plan.dtype, variants, plan.threads) as ports:
        # Without a floor a token takes several times as long, and fewer of them tell it.
        targets = {
            name: (port, {"max_tokens": ANSWER_TOKENS if variants[name].gate_floor else 8})
            for name, port in ports.items()
        }
        heard = alternating(targets, plan.requests)
    return {name: load.summary(each) for name, each in heard.items()}


def prefill(plan: Plan) -> dict[str, Any]:
    """Time to first token of a short prompt, alone and beside a long one."""
    long = body(question(LONG_WORDS, 0), max_tokens=4)
    generator = random.Random(0)

    def short(turn: int) -> dict[str, Any]:
        return body(question(12, turn), [turn % NEAR], max_tokens=4)

    async def run(port: int) -> dict[str, list[load.Heard]]:
        heard: dict[str, list[load.Heard]] = {"short, alone": [], "long, alone": [], "short beside long": []}
        await load.ask(port, long)
        heard["long, alone"].append(await load.ask(port, long))
        seconds = heard["long, alone"][0].first_s
        for turn in range(plan.requests + 1):
            alone = await load.ask(port, short(turn))
            other = asyncio.create_task(load.ask(port, long))
            await asyncio.sleep(seconds * generator.uniform(0.1, 0.8))
            beside = await load.ask(port, short(turn))
            await other
            if turn:
                heard["short, alone"].append(alone)
                heard["short beside long"].append(beside)
        return heard

    variants = {"pieces": EXPERTS, "whole": Variant(NEAR, piece=1 << 20)}
    found = {}
    with servers(plan.shape, plan.dtype, variants, plan.threads) as ports:
        for name, port in ports.items():
            heard = asyncio.run(run(port))
            found |= {f"{what}, {name}": load.summary(each) for what, each in heard.items()}
    return found


def opened(plan: Plan) -> dict[str, Any]:
    """Latencies under a Poisson process, at shares of what 8 clients get."""
    bodies, found = mixed(64), {}
    with servers(plan.shape, plan.dtype, {"bare": BARE, "experts": EXPERTS}, plan.threads) as ports:
        began = time.monotonic()
        heard = asyncio.run(load.closed(ports["bare"], mixed(2 * plan.requests, seed=1), 8))
        capacity = len(heard) / (time.monotonic() - began)
        asyncio.run(load.closed(ports["experts"], bodies[:8], 8))
        for share in RATES:
            for name, port in ports.items():
                rate = share * capacity
                heard = asyncio.run(load.opened(port, bodies, rate, plan.seconds, seed=int(100 * share)))
                found[f"{name}, {share:.1f} of capacity"] = {**load.summary(heard), "rate": rate}
    return found


PARTS: dict[str, Callable[[Plan], dict[str, Any]]] = {
    "token": token,
    "throughput": throughput,
    "growth": growth,
    "prefill": prefill,
    "open": opened,
}
HEADER = (
    "requests",
    "answered",
    "tokens per s",
    "first token p50",
    "p90",
    "p99",
    "token p50",
    "p90",
    "p99",
)


def lines(found: dict[str, Any]) -> list[str]:
    """Return the page line by line."""
    settings = ", ".join(f"{name} {value}" for name, value in found["settings"].items())
    shown = [f"# Serving, {found['environment']['machine']}", "", f"{settings}. Times in ms.", ""]
    for part, rows in found["parts"].items():
        at = found["measured"][part]
        summary = (PARTS[part].__doc__ or "").splitlines()[0]
        shown += [f"## {part}", "", f"{summary} Commit {at['commit']}, load {at['load']}.", ""]
        shown += markdown.table((part, *HEADER), [_cells(name, row) for name, row in rows.items()])
        shown.append("")
    return shown[:-1]


def _cells(name: str, row: dict[str, Any]) -> list[str]:
    counts = [str(row.get("requests", "–")), str(row.get("answered", "–")), f"{row['tokens_per_s']:.1f}"]
    times = []
    for what in ("first_token_ms", "token_ms"):
        times += [_number(row.get(what, {}).get(p)) for p in ("p50", "p90", "p99")]
    return [name, *counts, *times]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def plot(file: Path, rows: dict[str, Any]) -> Path:
    """Draw time to first token and time per token over the rate of requests."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for panel, (what, title) in zip(
        panels, (("first_token_ms", "time to first token"), ("token_ms", "time per token")), strict=True
    ):
        for name, colour in (("bare", "#7f7f7f"), ("experts", "#2ca02c")):
            of_name = sorted((row["rate"], row[what]) for key, row in rows.items() if key.startswith(name))
            rates = [rate for rate, _ in of_name]
            for percentile, style in (("p50", "-"), ("p90", "--"), ("p99", ":")):
                values = [times.get(percentile, np.nan) for _, times in of_name]
                label = f"{name}, {percentile}"
                panel.plot(rates, values, style, color=colour, marker="o", markersize=3, label=label)
        panel.set(title=title, xlabel="requests per second", ylabel="ms", yscale="log")
    panels[0].legend(fontsize=8)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
    return file


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the chosen parts, and write serve.json, serve.md and serve.png."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks serve", description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), metavar="PART")
    parser.add_argument("--model", default="small", choices=list(SHAPES), help="shape of the random LLaVA")
    parser.add_argument("--dtype", default="float32", choices=sorted(DTYPES))
    parser.add_argument("--threads", type=int, default=1, help="of a server (default: 1)")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each rate (default: 8)")
    parser.add_argument("--requests", type=int, default=12, help="of each measurement (default: 12)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: by machine)")
    arguments = parser.parse_args(argv)
    device = torch.device("cpu")
    out = arguments.out or machine.results_folder() / machine.machine_name(device)
    out.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(arguments, name) for name in ("model", "dtype", "threads")}
    plan = Plan(
        SHAPES[arguments.model],
        DTYPES[arguments.dtype],
        arguments.threads,
        arguments.seconds,
        arguments.requests,
    )
    file = out / "serve.json"
    before = json.loads(file.read_text()) if file.is_file() else {}
    if before.get("settings") != settings:
        before = {}
    environment = machine.environment(device)
    parts, measured = before.get("parts", {}), before.get("measured", {})
    for name in arguments.parts:
        began = time.monotonic()
        parts[name] = PARTS[name](plan)
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        measured[name] = {"commit": environment["commit"], "load": machine.load()}
    found = {"environment": environment, "settings": settings}
    for key, values in (("parts", parts), ("measured", measured)):
        found[key] = {name: values[name] for name in PARTS if name in values}
    file.write_text(json.dumps(found, indent=1) + "\n")
    (out / "serve.md").write_text("\n".join(lines(found)) + "\n")
    if "open" in parts:
        plot(out / "serve.png", parts["open"])
    print("\n".join(lines(found)))
    return 0
