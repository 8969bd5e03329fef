"""Run folders under damage: the same command goes on to the same report, says what it repeats, or refuses."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from random import Random
from typing import Any

from cram.atomic import read_json
from cram.commands.info import describe_path
from tests.cram import runs
from tests.fuzz.guard import Tally, attempt, fault_of_refusal
from tests.fuzz.mutate import mutate_bytes, mutate_header, mutate_json_file, mutate_tree

# A task that is learnt again takes its time.
RECORDS = ("run.json", "training.json", "result.json", "manifest.json", "cram.json", "report.json")


def prepare(folder: Path) -> Path:
    """A run of three tasks."""
    runs.learner(folder, tasks=runs.stream()).run()
    return folder


def damage(folder: Path, random: Random) -> str:
    """Change one file of a run."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    records = [path for path in files if path.name in RECORDS]
    file = random.choice(records if random.random() < 0.8 else files)
    named = file.relative_to(folder)
    kind = random.choice(("bytes", "tree", "fields", "fields", "swap"))
    if kind == "tree":
        return f"{named}: {mutate_tree(folder, file, random)}"
    if kind == "swap":
        same = [other for other in files if other.name == file.name]
        other = random.choice(same)
        first, second = file.read_bytes(), other.read_bytes()
        file.write_bytes(second)
        other.write_bytes(first)
        return f"{named} swapped with {other.relative_to(folder)}"
    if kind == "fields" and file.suffix == ".json":
        return f"{named}: {mutate_json_file(file, random)}"
    if kind == "fields" and file.suffix == ".safetensors":
        return f"{named}: {mutate_header(file, random)}"
    content, said = mutate_bytes(file.read_bytes(), random)
    file.write_bytes(content)
    return f"{named}: {said}"


def contents(folder: Path) -> dict[str, Any]:
    """Every file of a folder by its content, but for the results of a recovery."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = path.read_bytes() if path.stat().st_size < 1 << 24 else path.stat().st_size
    return found


def check(folder: Path, expected: Any) -> tuple[str, str | None]:
    """What came of a damaged run: its kind, and what is wrong with that."""
    shown = attempt(lambda: describe_path(folder))
    if shown.error is not None and (fault := fault_of_refusal(shown.error, folder)):
        return "info", f"info: {fault}"
    before = contents(folder)
    # Without a record the task counts as not finished, as after a kill.
    records = [path for path in before if path.endswith(("training.json", "result.json", "manifest.json"))]
    whole = sum((folder / path).is_file() for path in records) == 9
    said: list[str] = []

    def go_on() -> Any:
        learner = runs.learner(folder, tasks=runs.stream())
        learner._say = said.append
        return learner.run()

    found = attempt(go_on)
    if found.error is not None:
        fault = fault_of_refusal(found.error, folder)
        if fault is None and contents(folder) != before:
            fault = f"the refusal changed files: {found.error}"
        return "refused", fault
    repeated = [line for line in said if "again" in line]
    same = runs.timeless(found.value) == runs.timeless(expected)
    if not same and not repeated:
        return "resumed", "another report, and nothing said"
    if not repeated and whole and found.value != expected:
        return "resumed", "other seconds, and nothing said"
    if not same and "safetensors" not in repeated[0] and "result" not in repeated[0]:
        return "repeated", f"another report after: {repeated[0][:200]}"
    return "repeated" if repeated else "resumed", None


def run(whole: Path, seeds: range, place: Path) -> Tally:
    """One mutation per seed."""
    tally = Tally()
    expected = read_json(whole / "report.json")
    for seed in seeds:
        random = Random(seed)
        folder = place / str(seed) / "run"
        shutil.copytree(whole, folder)
        said = damage(folder, random)
        with tally.timed(seed):
            kind, fault = check(folder, expected)
        tally.add(kind, seed, said, fault)
        shutil.rmtree(place / str(seed))
    return tally
