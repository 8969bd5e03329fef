"""Break the sources in one place at a time, and count how often their tests notice.

    python -m benchmarks mutants --seed 1 --each 8 --only routing

Mutants are drawn from the seed. Each is judged in a fork of one process that has imported everything. The
tests that run the changed lines are its judges; the tests of the same name come first. A verdict is one JSON
line in the log. The same command goes on where it was stopped. It asks again where a source has changed, or
the tests of a survivor have. The table stands at the end.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pickle
import re
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.mutation import children, plan
from benchmarks.mutation.children import Verdict
from benchmarks.mutation.operators import Mutant, mutate
from benchmarks.mutation.room import Room, time_limit

# Processor time for imports in a process of a mutant's own.
IMPORT_S = 20


def main(argv: Sequence[str] | None = None) -> int:
    """Judge the mutants. Return 1 if a mutant survived that is not known as equivalent."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1, help="which mutants are drawn")
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
    rows = plan.of_today(plan.newest(plan.read(arguments.log)))
    print("\n".join(plan.summary([row for row in rows if re.search(arguments.only, row["source"])])))
    return int(bool(plan.unnoticed(rows)))


def _judge_all(arguments: argparse.Namespace) -> None:
    until = time.monotonic() + arguments.seconds
    os.environ["OMP_NUM_THREADS"] = "1"
    todo = _todo(arguments)
    if not todo:
        return
    children.prepare()
    scratch = arguments.log.with_suffix("")
    scratch.mkdir(exist_ok=True)
    later = scratch / "later"
    _in_room(todo, until, arguments.log, scratch, later)
    for mutant, tests in pickle.loads(later.read_bytes()):
        if time.monotonic() < until:
            names, limit_s = [each.name for each in tests], time_limit(tests) + IMPORT_S
            changed = mutate(_text(mutant.source), mutant.index)
            digests = plan.digests(mutant.source)
            verdict = children.judge(mutant.source, changed, names, limit_s, scratch)
            _keep(arguments.log, mutant, verdict, digests)


def _todo(arguments: argparse.Namespace) -> list[Mutant]:
    known = {row["name"]: row for row in plan.newest(plan.read(arguments.log))}
    found = []
    for source in plan.sources():
        if re.search(arguments.only, source):
            wanted = _wanted(source, arguments, known)
            done = {name for name, row in known.items() if not arguments.again and plan.holds(row)}
            found += [each for each in wanted if each.name not in done]
    return found


def _wanted(source: str, arguments: argparse.Namespace, known: dict[str, Any]) -> list[Mutant]:
    if not arguments.again:
        return plan.draw(source, arguments.each, arguments.seed)
    everything = plan.draw(source, 1 << 30, 0)
    lost = {row["name"] for row in plan.unnoticed(known.values())}
    return [each for each in everything if each.name in lost]


def _in_room(todo: Sequence[Mutant], until: float, log: Path, scratch: Path, later: Path) -> None:
    """Judge what can be judged in forks of one process; write down the others with their tests."""

    # Of what is imported; an edit during the run makes a verdict outdated.
    digests = {mutant.source: plan.digests(mutant.source) for mutant in todo}

    def work(room: Room) -> None:
        left = []
        for mutant in todo:
            if time.monotonic() > until:
                break
            found = room.judge(mutant, _text(mutant.source))
            if isinstance(found, Verdict):
                _keep(log, mutant, found, digests[mutant.source])
            else:
                left.append((mutant, found))
        later.write_bytes(pickle.dumps(left))

    later.unlink(missing_ok=True)
    files = sorted({file for mutant in todo for file in plan.tests_of(mutant.source)})
    process = multiprocessing.get_context("fork").Process(
        target=Room(plan.sources(), plan.tests_of, scratch, work).enter, args=(files,)
    )
    process.start()
    process.join()
    if not later.is_file():
        raise RuntimeError(f"the process of the tests ended with {process.exitcode}; its reason stands above")


def _text(source: str) -> str:
    return (plan.ROOT / source).read_text(encoding="utf-8")


def _keep(log: Path, mutant: Mutant, verdict: Verdict, digests: dict[str, str]) -> None:
    print(f"{verdict.status:9} {verdict.seconds:5.1f} s  {mutant.name}", flush=True)
    if verdict.status != "undecided":
        row = {**asdict(mutant), **digests, **asdict(verdict)}
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
