"""What a shipped base must be able to do before a stream on it says anything: `python -m benchmarks base`.

    zero-shot   the score of every task before anything is learnt; 30 to 50 % on average
    groups      CRAM's own grouping by the base's text tower over ten seeds, each task with a wording of its
                format that no training saw; at least 95 % of the test samples lie in a group of their format
    probe       a linear classifier on the tower's features: 96 animals near 100 %, single digits above 90 %
    update      one task learnt by a LoRA of each rank: its score, and |dW x| / |W0 x| on test samples, at
                most 0.2, with ranks 2 to 4 as good as higher ones

`--base`, `--clip` and `--stream` choose others; `--part` takes some of the four. With --out, the figures also
go to base.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SEEDS, BATCH = 10, 8
RANKS = (2, 4, 9)
PARTS = ("zero-shot", "groups", "probe", "update")
RIDGE = 1e-2


def main(argv: Sequence[str]) -> int:
    """Run the program; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks base",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--base", default="builtin-real", help="as --model of cram train")
    parser.add_argument("--clip", help="as --clip of cram train")
    parser.add_argument("--stream", default="builtin-real")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--tests", type=int, default=100, help="test samples per task")
    parser.add_argument("--trains", type=int, default=400, help="training samples of the task that is learnt")
    parser.add_argument("--tasks", nargs="+", help="tasks that are learnt (default: the first)")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate of the task")
    parser.add_argument("--out", metavar="DIR", help="folder of base.json")
    arguments = parser.parse_args(argv)
    found = {part: MEASURES[part](arguments) for part in arguments.part}
    print(json.dumps(found, indent=1))
    if arguments.out:
        Path(arguments.out).mkdir(parents=True, exist_ok=True)
        (Path(arguments.out) / "base.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


def zero_shot(arguments: argparse.Namespace) -> dict[str, float]:
    """Score of each task by the bare model, and their mean."""
    import cram
    from cram.console import ProgressBar
    from cram.learning.answers.generate import answer_task
    from cram.learning.batches import Budget, EncodedSplit
    from cram.loading import Sources
    from cram.scoring.scorers import score
    from cram.streams.registry import load_stream

    model, processor, encoder = Sources(arguments.base, arguments.clip).load("cpu")
    method = cram.attach(model, cram.CramConfig(eval_batch_size=32), encoder, processor).method
    found = {}
    for task in load_stream(arguments.stream, limit=arguments.tests).tasks:
        split = EncodedSplit(processor, task.test, Budget(1 << 28))
        with ProgressBar(task.name, len(task.test), False) as bar:
            answers, _ = answer_task(model, processor, method, task, split, bar)
        by_id = {sample.id: answer for sample, answer in zip(task.test, answers, strict=True)}
        found[task.name] = round(float(score(task.scorer, by_id, task.test)), 1)
    return {**found, "mean": round(float(np.mean(list(found.values()))), 1)}


def groups(arguments: argparse.Namespace) -> dict[str, Any]:
    """Over all seeds: share of test samples in a group of their format, and numbers of groups."""
    from cram.base.real.wordings import HELD_OUT
    from cram.config import CramConfig
    from cram.loading import Sources
    from cram.routing.groups import InstructionGroups
    from cram.streams.real.questions import FORMATS
    from cram.streams.registry import load_stream

    encoder = Sources(arguments.base, arguments.clip).load("cpu")[2]
    shares, counts, mixed = [], [], 0
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        stream = load_stream(arguments.stream, seed=seed, limit=arguments.tests)
        level, forms = InstructionGroups(CramConfig()), {}
        tests: list[tuple[str, Tensor]] = []
        for task in stream.tasks:
            form, ending = next(
                (name, row[0]) for name, row in FORMATS.items() if task.test[0].instruction.endswith(row[0])
            )
            wording = HELD_OUT[form][int(rng.integers(len(HELD_OUT[form])))]
            train, test = (
                encoder.encode_text(
                    [s.instruction.removesuffix(ending) + wording for s in split[: 8 * BATCH]]
                )
                for split in (list(task.train), list(task.test))
            )
            for batch in train.split(BATCH):
                level.observe(task.name, batch)
            if task.name not in level.locks:
                level.lock(task.name, int(level.assign(train.mean(0)[None])))
            forms[task.name] = form
            tests.append((form, test))
        members = [{forms[t] for t, g in level.locks.items() if g == group} for group in range(len(level))]
        right = [{form} == members[int(group)] for form, test in tests for group in level.assign(test)]
        shares.append(round(100 * float(np.mean(right)), 1))
        counts.append(len(level))
        mixed += sum(len(each) > 1 for each in members)
    return {"purity": shares, "least": min(shares), "groups": counts, "groups of several formats": mixed}


def probe(arguments: argparse.Namespace) -> dict[str, float]:
    """Accuracy of a linear classifier on mean token features, by kind of picture."""
    from PIL import Image

    from cram.loading import Sources
    from cram.streams.real.sheets import load_set
    from cram.streams.real.tasks import draw_animal

    encoder = Sources(arguments.base, arguments.clip).load("cpu")[2]
    rng = np.random.default_rng(0)
    found = {}
    for drawings in ("noto-animals", "twemoji-animals"):
        drawn = [draw_animal(rng, drawings) for _ in range(24 * 96)]
        names = list(load_set(drawings).names)
        labels = torch.tensor([names.index(shown.name) for _, shown in drawn])
        features = tokens(encoder, [picture for picture, _ in drawn])
        found[drawings] = linear_accuracy(features, labels, len(drawn) * 5 // 6)
    digits, sizes = [load_set(f"digits-{split}") for split in ("train", "test")], []
    order = rng.permutation(len(digits[0]))
    pictures, labels = [], []
    for source, index in ((digits[0], order), (digits[1], range(len(digits[1])))):
        pictures += [Image.fromarray(source.pixels[i]).convert("RGB").resize((96, 96)) for i in index]
        labels += [int(source.names[i]) for i in index]
        sizes.append(len(pictures))
    found["digits"] = linear_accuracy(tokens(encoder, pictures), torch.tensor(labels), sizes[0])
    return found


@torch.no_grad()
def tokens(encoder: Any, pictures: list[Any]) -> Tensor:
    """Mean token features [N, H] of the encoder's vision tower."""
    found = []
    for start in range(0, len(pictures), 64):
        values = encoder.image_processor(images=pictures[start : start + 64], return_tensors="pt")
        found.append(encoder._vision(pixel_values=values["pixel_values"]).last_hidden_state.mean(1))
    return torch.cat(found)


def linear_accuracy(features: Tensor, labels: Tensor, trained: int) -> float:
    """Percentage right on the rows behind `trained`, by ridge regression on the rows before."""
    scaled = (features - features[:trained].mean(0)) / (features[:trained].std(0) + 1e-3)
    scaled = torch.cat([scaled, torch.ones(len(scaled), 1)], 1)
    known, target = scaled[:trained], F.one_hot(labels[:trained]).float()
    weights = torch.linalg.solve(
        known.T @ known / trained + RIDGE * torch.eye(known.shape[1]), known.T @ target / trained
    )
    right = (scaled[trained:] @ weights).argmax(1) == labels[trained:]
    return round(100 * float(right.float().mean()), 1)


def update(arguments: argparse.Namespace) -> dict[str, Any]:
    """By task and rank: the score after learning, and the size of the update beside the base's output."""
    from cram.config import CramConfig
    from cram.learning.learner import ContinualLearner
    from cram.loading import Sources
    from cram.streams.registry import load_stream
    from cram.streams.types import Stream, Task

    stream = load_stream(arguments.stream)
    chosen = arguments.tasks or [stream.tasks[0].name]
    found: dict[str, Any] = {}
    for task in (task for task in stream.tasks if task.name in chosen):
        cut = (list(task.train)[: arguments.trains], list(task.test)[: arguments.tests])
        alone = Stream("one", (Task(task.name, *cut, task.scorer, task.max_new_tokens),))
        for rank in arguments.ranks:
            config = CramConfig(
                method="isolated", rank=rank, learning_rate=arguments.rate, batch_size=16, eval_batch_size=64
            )
            model, processor, encoder = Sources(arguments.base, arguments.clip).load("cpu")
            with tempfile.TemporaryDirectory() as folder:
                learner = ContinualLearner(
                    model, processor, alone, config, out=folder, encoder=encoder, progress=False
                )
                learner.learn(0)
                with measured(model) as ratios:
                    score = learner.evaluate(0)[0]
            ratio = float(np.sqrt(np.mean(np.square(ratios))))
            found[f"{task.name}, rank {rank}"] = {"score": round(score, 1), "ratio": round(ratio, 3)}
    return found


@contextmanager
def measured(model: Any) -> Iterator[list[float]]:
    """Collect |dW x| / |W0 x| of every adapted linear and forward."""
    from cram.model.linear import ExpertLinear

    ratios: list[float] = []

    def after(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        plain = module.base(inputs[0])
        ratios.append(float((output - plain).norm() / plain.norm()))

    hooks = [each.register_forward_hook(after) for each in model.modules() if isinstance(each, ExpertLinear)]
    try:
        yield ratios
    finally:
        for hook in hooks:
            hook.remove()


MEASURES = {"zero-shot": zero_shot, "groups": groups, "probe": probe, "update": update}
