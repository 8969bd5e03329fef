"""For how many tokens this library's base product beats torch's on this processor.

    python -m benchmarks crossovers            measure and print the row, and whether the table says the same
    python -m benchmarks crossovers --write    put the row into csrc/expert_lora/crossovers_table.h

Each number of tokens is timed on two widths, the layer with the product here against the layer with torch's,
all else equal. The crossover is the largest number for which ours is faster by 2 % or more on the sum of
both, if it takes at most 2 % longer for all smaller ones. Build the library again after `--write`.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks import machine, markdown, ours
from benchmarks.cases import Case
from benchmarks.problem import rotation
from benchmarks.suite import step
from benchmarks.timing import Limits, interleaved, sampler
from cram_kernels.crossovers import Crossovers, crossovers, set_crossovers

FILE = machine.ROOT / "csrc" / "expert_lora" / "crossovers_table.h"
LINE = re.compile(r'CRAM_CROSSOVER\("(?P<vendor>\w*)",\s+"(?P<unit>\w+)",\s*(?P<numbers>\d+(?:,\s*\d+){5})\)')
MODELS = ("Qwen3-VL-2B", "LLaVA-1.5-7B")
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SLACK = 1.02
FIELDS = {
    ("decode", "float32"): "base",
    ("train", "float32"): "gradient",
    ("decode", "bfloat16"): "half_base",
    ("train", "bfloat16"): "half_gradient",
}


def table() -> list[Crossovers]:
    """Return the rows of the table."""
    rows = []
    for found in LINE.finditer(FILE.read_text()):
        rows.append(Crossovers(found["vendor"], found["unit"], *map(int, found["numbers"].split(","))))
    return rows


def line(row: Crossovers) -> str:
    """Return a row as the table has it."""
    vendor, unit = f'"{row.vendor}",', f'"{row.unit}",'
    numbers = f"{row.least}, {row.base}, {row.gradient},".ljust(12)
    numbers += f"{row.half_least}, {row.half_base}, {row.half_gradient}"
    return f"CRAM_CROSSOVER({vendor:10}{unit:12}{numbers})"


def written(text: str, row: Crossovers) -> str:
    """Return the table's text with the row of that vendor and unit replaced, or in front of all others."""
    for found in LINE.finditer(text):
        if (found["vendor"], found["unit"]) == (row.vendor, row.unit):
            return text.replace(found[0], line(row))
    first = LINE.search(text)
    if first is None:
        raise ValueError(f"{FILE.name} must hold a row, got none")
    return text[: first.start()] + line(row) + "\n" + text[first.start() :]


def span(ratios: dict[int, float]) -> tuple[int, int]:
    """Return the ends of the first run of numbers of tokens in which ours over torch's is within the slack.

    A tie at the end is torch's. (1, 0) if ours is never faster.
    """
    lost = itertools.dropwhile(lambda tokens: ratios[tokens] > SLACK, sorted(ratios))
    run = list(itertools.takewhile(lambda tokens: ratios[tokens] <= SLACK, lost))
    while run and ratios[run[-1]] * SLACK > 1:
        run.pop()
    return (run[0], run[-1]) if run else (1, 0)


def computes(row: Crossovers, op: str, dtype: str) -> bool:
    """Return whether this library has such a product: gradients by tiles alone, in bfloat16."""
    return op != "train" or (row.unit == "tiles" and dtype == "bfloat16")


def compare(op: str, dtype: str, tokens: int, seconds: float) -> tuple[float, float]:
    """Return the layer's time over all models with the product here, and with torch's."""
    field = FIELDS[op, dtype]
    row = replace(_row(), least=1, half_least=1)
    choices = {name: replace(row, **{field: most}) for name, most in (("here", 1 << 30), ("torch", 0))}
    device, sums = torch.device("cpu"), dict.fromkeys(choices, 0.0)
    for model in MODELS:
        case = Case(op, model, "q", "trigap", tokens, 1 if op == "train" else tokens, dtype)
        problems = rotation(case, device, machine.cache_bytes(device))
        with torch.set_grad_enabled(case.training):
            steps = [step(p, ours.two_ops(p, "native")) for p in problems]
            turns = itertools.count()
            samplers = {
                name: sampler([_under(choice, one) for one in steps], device, False, turns)
                for name, choice in choices.items()
            }
            for name, timing in interleaved(samplers, device, Limits(seconds, 5, 40)).items():
                sums[name] += timing.median_us
    set_crossovers(None)
    return sums["here"], sums["torch"]


def _under(row: Crossovers, call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        set_crossovers(row)
        return call()

    return run


def _row() -> Crossovers:
    found = crossovers()
    if found is None:
        raise SystemExit("the native library for the CPU is missing; run python csrc/build.py")
    return found[0]


def main(argv: Sequence[str]) -> int:
    """Print the measurements and the row; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks crossovers", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--write", action="store_true", help="put the row into the table")
    parser.add_argument("--vendor", help="vendor of the row (default: this processor's)")
    parser.add_argument("--seconds", type=float, default=0.3, help="time per candidate")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    arguments = parser.parse_args(argv)
    row, shown = replace(_row(), gradient=0, half_gradient=0), []
    if arguments.vendor is not None:
        row = replace(row, vendor=arguments.vendor)
    for (op, dtype), field in FIELDS.items():
        if not computes(row, op, dtype):
            continue
        ratios = {}
        for tokens in arguments.tokens:
            here, there = compare(op, dtype, tokens, arguments.seconds)
            ratios[tokens] = here / there
            shown.append([field, str(tokens), f"{here:.0f}", f"{there:.0f}", f"{here / there:.2f}"])
            print(*shown[-1], flush=True)
        least, most = span(ratios)
        if op == "train":  # the gradient has no least number
            row = replace(row, **{field: most if least == min(ratios) else 0})
        else:
            row = replace(row, **{field: most, field.replace("base", "least"): least})
    print("\n".join(markdown.table(["product", "tokens", "here, µs", "torch, µs", "ratio"], shown)))
    print(line(row))
    if arguments.write:
        FILE.write_text(written(FILE.read_text(), row))
    same = row in table()
    print("the table says the same" if same else "the table says otherwise")
    return 0


if __name__ == "__main__":
    import sys

    raise SystemExit(main(sys.argv[1:]))
