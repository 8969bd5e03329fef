"""Bundles under damage: each loads with the same answers, or is refused in one line and changes nothing."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

from cram import detach, load, save
from tests.cram import factories, runs
from tests.cram.bundle.damage import resign
from tests.cram.bundle.test_cost import state_of
from tests.fuzz.guard import Outcome, Tally, attempt, fault_of_refusal
from tests.fuzz.mutate import mutate_bytes, mutate_header, mutate_json_file, mutate_tree

OLDER = Path(__file__).parents[1] / "cram/bundle/format2"
OLD = ("cram", "branchlora", "moelora", "many")


@dataclass
class Bundles:
    """Whole bundles, one model that loads each of them, and what the model answers then."""

    folders: list[Path]
    model: Any
    encoder: Any
    batch: dict[str, torch.Tensor]
    answers: dict[Path, torch.Tensor]
    plain: dict[str, Any]


def prepare(folder: Path, methods: Sequence[str] = ()) -> Bundles:
    """Bundles in an older format and in the current one, and those of `methods`, as two tasks leave them."""
    model, encoder = factories.fresh()
    processor = factories.llava_processor()
    prompts = [factories.prompt(question) for question in factories.QUESTIONS[:2]]
    pictures = [factories.image(0), factories.image(1)]
    batch = processor(text=prompts, images=pictures, padding=True, return_tensors="pt")
    folders = [Path(shutil.copytree(OLDER / name, folder / f"older-{name}")) for name in OLD]
    for older in list(folders):
        load(model, older, encoder, processor)
        folders.append(folder / older.name.removeprefix("older-"))
        save(model, folders[-1])
        detach(model)
    folders += [learnt(folder / f"run-{method}", method) for method in methods]
    made = Bundles(folders, model, encoder, dict(batch), {}, {})
    for each in folders:
        load(model, each, encoder, processor)
        made.answers[each] = answers(made)
        detach(model)
    made.plain = state_of(model)
    return made


def learnt(folder: Path, method: str) -> Path:
    """The bundle behind two tasks that share a group."""
    settings = {"max_steps": 3, "dropout": 0.0, "group_merge_similarity": -1.0}
    learner = runs.learner(folder, method, runs.two_tasks(), **settings)
    learner.learn(0)
    learner.learn(1)
    return learner.folder.bundle(1)


@torch.no_grad()
def answers(bundles: Bundles) -> torch.Tensor:
    """The last logits for two questions with a picture each, as answers of the first task."""
    cram = bundles.model.cram
    with cram.forced(0) if cram.method.told_task and cram.num_experts else nullcontext():
        return bundles.model(**bundles.batch).logits[:, -1]


def damage(bundle: Path, random: Random) -> tuple[str, bool]:
    """Change a bundle; returns what was changed, and whether its maker could have written it so."""
    files = sorted(path for path in bundle.rglob("*") if path.is_file())
    file = random.choice(files)
    named = file.relative_to(bundle)
    kind = random.choice(("bytes", "tree", "signed bytes", "fields", "fields", "header"))
    if kind == "tree":
        return f"{named}: {mutate_tree(bundle, file, random)}", False
    if kind == "bytes":
        content, said = mutate_bytes(file.read_bytes(), random)
        file.write_bytes(content)
        return f"{named}: {said}", False
    if kind == "signed bytes":
        content, said = mutate_bytes(file.read_bytes(), random)
        file.write_bytes(content)
    elif file.suffix == ".json":
        said = mutate_json_file(file, random)
    else:
        said = mutate_header(file, random)
    signed = file.name != "manifest.json"
    if signed:
        resign(bundle)
    return f"{named}: {said}", signed


def check(bundles: Bundles, whole: Path, bundle: Path, signed: bool) -> tuple[str, str | None]:
    """What came of a damaged bundle: its kind, and what is wrong with that."""
    processor = factories.llava_processor()
    found = attempt(lambda: load(bundles.model, bundle, bundles.encoder, processor))
    if found.error is not None:
        fault = fault_of_refusal(found.error, bundle)
        if state_of(bundles.model) != bundles.plain:
            fault = f"{fault or found.error}; the model has changed"
        return "refused", fault
    with Outcome() as forward:
        forward.value = answers(bundles)
    detach(bundles.model)
    if forward.error is not None:
        return "loaded", f"the first forward fails: {type(forward.error).__name__}: {forward.error}"
    same = torch.equal(forward.value, bundles.answers[whole])
    if state_of(bundles.model) != bundles.plain:
        return "loaded", "detaching does not restore the model"
    return ("loaded the same", None) if same else ("loaded another", None if signed else "other answers")


def run(bundles: Bundles, seeds: range, place: Path) -> Tally:
    """One mutation per seed."""
    tally = Tally()
    for seed in seeds:
        random = Random(seed)
        whole = random.choice(bundles.folders)
        bundle = place / str(seed) / "bundle"
        shutil.copytree(whole, bundle)
        said, signed = damage(bundle, random)
        with tally.timed(seed):
            kind, fault = check(bundles, whole, bundle, signed)
        tally.add(kind, seed, f"{whole.relative_to(place)}/{said}", fault)
        shutil.rmtree(place / str(seed))
    return tally
