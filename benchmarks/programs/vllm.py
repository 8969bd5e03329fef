"""vLLM's plugin: a gated group against a plain LoRA of its rank and the base, with the plugin and without.

    python -m benchmarks vllm

Runs in the environment of `make vllm-tests`. Eight requests at once; tokens per CPU second of the engine's
process, because other programs do not change it as they change wall time. The engines take turns, and a ratio
is the median over rounds of two neighbouring figures.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import machine, markdown
from benchmarks.served import SHAPES
from benchmarks.vllm_engines import EXPERTS, ROWS, SLOT, Work, engines, prepare

# Prompt and answer in tokens; a rate counts the tokens of the answers, or those of the prompts.
PHASES = {"decode": (8, 24), "prefill": (64, 1)}
CANDIDATES = (("base", True), ("base", False), ("plain", True), ("plain", False), ("gated", True))
RATIOS = {
    "gated / plain": (("gated", True), ("plain", True)),
    "base, with the plugin / without": (("base", True), ("base", False)),
    "plain, with the plugin / without": (("plain", True), ("plain", False)),
}


def measured(shape: str, rounds: int) -> dict[str, Any]:
    """Rates by phase and candidate, one per round."""
    rates: dict[str, dict[str, list[float]]] = {phase: {} for phase in PHASES}
    with tempfile.TemporaryDirectory() as folder:
        group = prepare(Path(folder), shape)
        with engines(Path(folder), group, shape) as pipes:
            for turn in range(rounds + 1):
                for phase, (prompt, answer) in PHASES.items():
                    for kind, plugin in CANDIDATES[:: 1 if turn % 2 else -1]:
                        pipes[plugin].send(Work(kind, prompt, answer, turn))
                        cpu, _ = pipes[plugin].recv()
                        if turn:  # The first round warms up.
                            tokens = ROWS * (answer if phase == "decode" else prompt)
                            rates[phase].setdefault(name(kind, plugin), []).append(tokens / cpu)
    return rates


def name(kind: str, plugin: bool) -> str:
    """A row's name."""
    return kind if plugin else f"{kind}, no plugin"


def lines(found: dict[str, Any]) -> list[str]:
    """Return the page line by line."""
    settings = ", ".join(f"{key} {value}" for key, value in found["settings"].items())
    shown = [f"# vLLM's plugin, {found['environment']['machine']}", "", f"{settings}.", ""]
    rates = found["rates"]
    rows = [
        [row, *(f"{median(rates[phase][row]):.1f}" for phase in PHASES)] for row in rates[next(iter(PHASES))]
    ]
    shown += markdown.table(["tokens per CPU second", *PHASES], rows)
    rows = [
        [ratio, *(f"{found['ratios'][ratio][phase]:.3f}" for phase in PHASES)] for ratio in found["ratios"]
    ]
    return [*shown, "", *markdown.table(["ratio", *PHASES], rows)]


def ratios(rates: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Median over rounds of one candidate's rate over another's."""
    return {
        ratio: {
            phase: median(
                x / y for x, y in zip(rates[phase][name(*one)], rates[phase][name(*two)], strict=True)
            )
            for phase in PHASES
        }
        for ratio, (one, two) in RATIOS.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write vllm.json and vllm.md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks vllm", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="small", choices=list(SHAPES), help="shape of the random LLaVA")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each candidate (default: 7)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: by machine)")
    arguments = parser.parse_args(argv)
    device = torch.device("cpu")
    out = arguments.out or machine.results_folder() / machine.machine_name(device)
    out.mkdir(parents=True, exist_ok=True)
    settings = {"model": arguments.model, "rounds": arguments.rounds, "requests": ROWS}
    settings |= {"experts": EXPERTS, "rank": SLOT, "vllm": machine.package_version("vllm")}
    rates = measured(arguments.model, arguments.rounds)
    found = {"environment": machine.environment(device), "settings": settings}
    found |= {"rates": rates, "ratios": ratios(rates)}
    (out / "vllm.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "vllm.md").write_text("\n".join(lines(found)) + "\n")
    print("\n".join(lines(found)))
    return 0
