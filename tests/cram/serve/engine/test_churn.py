"""No neighbour changes an answer: requests join, leave, fail and change their experts at random."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cram.bundle.bundle import load, save
from cram.serve.engine.engine import Engine
from cram.serve.engine.limits import Limits
from cram.serve.request import Collector, Request
from tests.cram.factories import QUESTIONS, routed_llava
from tests.cram.serve.engine.test_versions import grown
from tests.cram.serve.serving import ask, llava_prompt, offline, run

TOKENS = 14
PICTURES: list[tuple[str, tuple[int, ...]]] = [
    (QUESTIONS[0], (0,)),
    (QUESTIONS[1], (1, 3)),
    (f"{QUESTIONS[0]} and {QUESTIONS[1]} and more", (2,)),
    (QUESTIONS[1], ()),
]
MIXTURES: list[Mapping[str, float] | None] = [None, None, None, {"other": 1.5}, {"old": 0.5, "new": -0.5}, {}]
SAMPLINGS: list[dict[str, Any]] = [{}, {"n": 2}, {"n": 3, "temperature": 1.0, "seed": 5}]
KINDS = [(p, m, s) for p in range(len(PICTURES)) for m in range(len(MIXTURES)) for s in range(len(SAMPLINGS))]


class Asked(NamedTuple):
    """A request of the churn: its kind, its tokens at most, itself and who listens to it."""

    kind: tuple[int, int, int]
    tokens: int
    request: Request
    heard: Collector


def asked(processor: Any, kind: tuple[int, int, int], tokens: int) -> Asked:
    """A request of one kind."""
    prompt = llava_prompt(processor, PICTURES[kind[0]][0], *PICTURES[kind[0]][1])
    request, heard = ask(prompt, MIXTURES[kind[1]], max_tokens=tokens, **SAMPLINGS[kind[2]])
    return Asked(kind, tokens, request, heard)


def tokens_of(heard: Collector) -> list[list[int]]:
    """The tokens of every answer."""
    return [choice.token_ids for choice in heard.choices]


def alone(engine: Engine, processor: Any, kinds: set[tuple[int, int, int]]) -> dict[Any, list[list[int]]]:
    """The answers of requests that have no neighbours."""
    found = {}
    for kind in sorted(kinds):
        one = asked(processor, kind, TOKENS)
        engine.submit(one.request)
        run(engine, one.heard)
        found[kind] = tokens_of(one.heard)
    return found


def poison(engine: Engine, generator: random.Random) -> Request | None:
    """Break the numbers of one answer in flight; the request that fails of it."""
    rows = [
        (batch, row)
        for batch in engine._worker._batches.values()
        for row, answer in enumerate(batch.answers)
        if not answer.request.cancelled
    ]
    if not rows:
        return None
    batch, row = generator.choice(rows)
    for tensor in batch._cache._tensors():
        tensor[row, :, batch._cache.starts[row] : batch._cache.end] = float("nan")
    return batch.answers[row].request


@pytest.mark.parametrize("seed", range(2))
def test_no_neighbour_changes_an_answer(seed: int, tmp_path: Path) -> None:
    generator = random.Random(seed)
    kinds = [generator.choice(KINDS) for _ in range(20)]
    later, processor, _ = grown()
    save(later, tmp_path / "four")
    model = routed_llava()[0]
    first = llava_prompt(processor, PICTURES[0][0], *PICTURES[0][1])
    whole = {name: offline(each, first, TOKENS) for name, each in ((1, model), (2, later))}
    limits = Limits(rows=12, piece=8)
    engine = Engine(model, processor, limits)
    wanted = {*kinds, (0, 0, 0)}
    expected = {
        1: alone(engine, processor, wanted),
        2: alone(Engine(later, processor, limits), processor, wanted),
    }
    assert {name: [whole[name]] for name in whole} == {name: each[0, 0, 0] for name, each in expected.items()}
    sent: list[Asked] = []
    broken: set[Request] = set()
    for turn in range(60):
        if turn % 3 == 0:
            sent.append(asked(processor, kinds[turn // 3], generator.randrange(3, TOKENS)))
            engine.submit(sent[-1].request)
        if generator.random() < 0.06:
            generator.choice(sent).request.cancel()
        if turn in (17, 46):
            engine.replace(lambda: load(model, tmp_path / "four"))
        if turn == 32:
            engine.roll_back()
        if turn % 7 == 6 and (victim := poison(engine, generator)) is not None:
            broken.add(victim)
        engine.turn()
    run(engine, *(each.heard for each in sent if not each.request.cancelled))
    versions = set()
    for each in sent:
        if each.heard.started is None:
            assert each.request.cancelled
            continue
        number = each.heard.started.decision.bundle
        versions.add(number)
        answers = [ids[: each.tokens] for ids in expected[1 if number == 1 else 2][each.kind]]
        if each.request in broken:
            assert each.heard.failed is not None and "not finite" in each.heard.failed.message
        if each.request.cancelled:
            answers = [ids[: len(made)] for ids, made in zip(answers, tokens_of(each.heard), strict=True)]
        assert tokens_of(each.heard) == answers, (each.kind, number)
    assert len(versions) > 1 and broken
