"""DISCO's routing: means of texts, a softmax over their cosines, one LoRA alone in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cram import attach
from cram.config import CramConfig
from cram.methods.disco import TEMPERATURE
from cram.routing.query import Query
from tests.cram import factories
from tests.cram.factories import QUESTIONS, image


def attached(**config: Any) -> Any:
    """A tiny LLaVA with DISCO."""
    clip = factories.clip_model()
    model = factories.llava(clip=clip)
    encoder = factories.clip_encoder(model, clip)
    return attach(model, CramConfig(method="disco", **config), encoder, factories.llava_processor())


def learnt(cram: Any) -> list[Query]:
    """Two tasks that have seen two batches each; returns the queries."""
    batches = [[QUESTIONS[0]], [QUESTIONS[0] + "?", "Which shade"], [QUESTIONS[1]], [QUESTIONS[1] + "!"]]
    queries = [cram.encode(texts, [[image(0)] for _ in texts]) for texts in batches]
    for task in range(2):
        cram.method.begin_task(f"task{task}", 3)
        for query in queries[2 * task : 2 * task + 2]:
            cram.method.observe(query)
        cram.method.end_task()
    return queries


def test_gates_are_a_softmax_over_cosines_with_the_tasks_mean_texts() -> None:
    cram = attached()
    queries = learnt(cram)
    means = [torch.cat([q.text for q in queries[2 * t : 2 * t + 2]]).mean(0) for t in range(2)]
    asked = cram.encode([QUESTIONS[2], QUESTIONS[1]], [[image(1)], []])
    cosines = [[torch.cosine_similarity(text, mean, dim=0) for mean in means] for text in asked.text]
    wanted = torch.softmax(torch.tensor(cosines) / 0.05, dim=1)
    gates = cram.method.route(asked, False).gates
    torch.testing.assert_close(gates, wanted.expand(cram.num_layers, 2, 2))
    assert TEMPERATURE == 0.05 and float(wanted.min()) > 0


def test_the_picture_decides_nothing() -> None:
    cram = attached()
    learnt(cram)
    seen, other, none = (cram.encode([QUESTIONS[0]], [pictures]) for pictures in ([image(0)], [image(9)], []))
    gates = [cram.method.route(query, False).gates for query in (seen, other, none)]
    assert torch.equal(gates[0], gates[1]) and torch.equal(gates[0], gates[2])


def test_training_uses_the_newest_alone() -> None:
    cram = attached()
    (query, *_) = learnt(cram)
    assert cram.method.route(query, True).gates.tolist() == [[[0.0, 1.0]]] * cram.num_layers


def test_a_training_that_goes_on_has_its_anchor() -> None:
    cram, again = attached(), attached()
    first, second, third, _ = learnt(cram)
    again.method.begin_task("task0", 3)
    for query in (first, second):
        again.method.observe(query)
    again.method.end_task()
    cram.method.begin_task("task2", 3)
    cram.method.observe(third)
    again.method.begin_task("task1", 3)
    again.method.end_task()
    again.method.import_training("task2", 3, *cram.method.export_training())
    anchor = cram.method.export_state().tensors["text_anchors"][-1]
    assert torch.equal(again.method.export_state().tensors["text_anchors"][-1], anchor) and anchor.any()


@pytest.mark.parametrize("released", [False, True])
def test_only_the_released_code_mixes_the_samples_of_a_batch(released: bool) -> None:
    cram = attached(released_code=released)
    learnt(cram)
    together = cram.encode([QUESTIONS[0], QUESTIONS[1]], [[], []])
    gates = cram.method.route(together, False).gates[0]
    alone = cram.method.route(cram.encode([QUESTIONS[0]], [[]]), False).gates[0, 0]
    assert torch.equal(gates[0], gates[1]) == released
    assert torch.allclose(gates[0], alone) != released


def test_a_state_of_other_tasks_is_refused(tmp_path: Path) -> None:
    cram = attached()
    learnt(cram)
    tensors, values = cram.method.export_state()
    with pytest.raises(ValueError, match="text_anchors must have shape"):
        cram.method.import_state({"text_anchors": tensors["text_anchors"][:1]}, values)
