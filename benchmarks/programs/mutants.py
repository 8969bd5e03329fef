"""Break the sources in one place at a time, and count how often their tests notice.

    python -m benchmarks mutants --seed 1 --each 8 --only routing

Mutants are drawn from the seed. A verdict is one JSON line in the log; the same command goes on where it was
stopped, and asks again where a source or its tests have changed since. The table stands at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.mutation import children, plan
from benchmarks.mutation.operators import Mutant, mutate

# A mutant's tests may take so much longer than those of its source, and some seconds beside that.
FACTOR, SPARE_S = 3, 5


def main(argv: Sequence[str] | None = None) -> int:
    """Judge the mutants. Return 1 if a mutant survived that is not known as equivalent."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="which mutants are drawn")
    parser.add_argument("--each", type=int, default=8, help="mutants per source")
    parser.add_argument("--only", default="", metavar="REGEX", help="sources whose path matches")
    parser.add_argument("--log", type=Path, default=Path("build/mutants.jsonl"), help="one verdict per line")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no mutant after so long")
    parser.add_argument("--again", action="store_true", help="judge only the survivors of the log")
    parser.add_argument("--table", action="store_true", help="print the table of the log and judge nothing")
    arguments = parser.parse_args(argv)
    arguments.log.parent.mkdir(parents=True, exist_ok=True)
    if not arguments.table:
        _judge_all(arguments)
    rows = plan.newest(plan.read(arguments.log))
    print("\n".join(plan.summary([row for row in rows if re.search(arguments.only, row["source"])])))
    return int(any(row["status"] == "survived" and row["name"] not in plan.EQUIVALENTS for row in rows))


def _judge_all(arguments: argparse.Namespace) -> None:
    until = time.monotonic() + arguments.seconds
    os.environ["OMP_NUM_THREADS"] = "1"
    children.prepare()
    for source in plan.sources():
        if not re.search(arguments.only, source):
            continue
        known = {row["name"]: row for row in plan.newest(plan.read(arguments.log))}
        todo = [each for each in _wanted(source, arguments, known) if not _is_judged(each, source, known)]
        if todo and time.monotonic() < until:
            _judge_source(source, todo, until, arguments.log)


def _wanted(source: str, arguments: argparse.Namespace, known: dict[str, Any]) -> list[Mutant]:
    if not arguments.again:
        return plan.draw(source, arguments.each, arguments.seed)
    everything = plan.draw(source, 1 << 30, 0)
    lost = {name for name, row in known.items() if row["status"] == "survived"} - plan.EQUIVALENTS.keys()
    return [each for each in everything if each.name in lost]


def _is_judged(mutant: Mutant, source: str, known: dict[str, Any]) -> bool:
    row = known.get(mutant.name)
    return row is not None and row["digest"] == plan.digest(source)


def _judge_source(source: str, todo: list[Mutant], until: float, log: Path) -> None:
    text = (plan.ROOT / source).read_text(encoding="utf-8")
    tests = plan.tests_of(source)
    with tempfile.TemporaryDirectory() as folder:
        whole = children.judge(source, text, tests, 600, Path(folder))
        if whole.noticed:
            raise RuntimeError(f"tests of {source} must pass on the source itself, got {whole}")
        limit = FACTOR * whole.seconds + SPARE_S
        print(f"{source}: {len(todo)} mutants, {whole.seconds:.1f} s for {len(tests)} test files", flush=True)
        for mutant in todo:
            if time.monotonic() > until:
                return
            changed = mutate(text, mutant.index)
            verdict = children.judge(source, changed, tests, limit, Path(folder))
            if verdict.status == "undecided":
                continue
            row = {**asdict(mutant), "digest": plan.digest(source), **asdict(verdict)}
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(f"  {verdict.status:9} {verdict.seconds:5.1f} s  {mutant.name}", flush=True)
