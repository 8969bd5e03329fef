"""BranchLoRA: which branches are trained and freeze, whose routers act, and that A is one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cram import load, save
from cram.methods.branchlora import BRANCHES, frozen_after, pool_order
from cram.model.state import ForwardState
from cram.routing.query import Query
from tests.cram import factories, runs


def test_two_branches_freeze_a_task_and_two_never() -> None:
    assert [frozen_after(tasks) for tasks in range(7)] == [0, 2, 4, 6, 6, 6, 6]


def test_the_most_used_freeze_behind_the_frozen() -> None:
    used = torch.tensor([9.0, 9.0, 1.0, 5.0, 0.0, 7.0, 2.0, 3.0])
    assert pool_order(used, 2, 2) == [0, 1, 5, 3, 2, 4, 6, 7]
    assert pool_order(used, 0, 2) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert pool_order(used, 6, 0) == list(range(8))


def weights(cram: Any) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """Copies of every branch's factors."""
    pool = [cram.expert_weights(index) for index in range(len(BRANCHES))]
    return [{path: (a.clone(), b.clone()) for path, (a, b) in each.items()} for each in pool]


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A learner after two tasks, with the pool as it was after the first in `first`."""
    made = runs.learner(tmp_path_factory.mktemp("run"), "branchlora")
    made.learn(0)
    made.first = weights(made.cram)
    made.first_state = copy.deepcopy(made.method.export_state().tensors)
    made.learn(1)
    return made


def test_frozen_branches_stay_and_a_trains_on(learnt: Any) -> None:
    cram, second = learnt.cram, weights(learnt.cram)
    moved = 0
    for path, module in cram.modules.items():
        pack = module.experts
        assert (
            pack.shared_a
            and pack.trained == 0
            and pack.a.shape[0] == min(cram.config.rank_max, module.in_features, module.out_features)
        )
        assert not torch.equal(second[0][path][0], learnt.first[0][path][0])
        for index in (0, 1):
            assert torch.equal(second[index][path][1], learnt.first[index][path][1])
            assert learnt.first[index][path][1].any()
        moved += sum(not any(torch.equal(s[path][1], f[path][1]) for f in learnt.first) for s in second[2:])
    assert moved > 0


def test_routers_of_all_tasks_follow_the_branches_that_move(learnt: Any) -> None:
    """Every module orders its branches by their use there, the four frozen ones staying first."""
    model = copy.deepcopy(learnt.model)
    cram, method = model.cram, model.cram.method
    method.begin_task("third", 3)
    orders = {}
    for path, module in cram.modules.items():
        with torch.no_grad():
            module.experts.trained_b.normal_()
        module.gating.used = torch.randperm(len(BRANCHES)).float()
        orders[path] = pool_order(module.gating.used, 4, 2)
    assert len({tuple(order) for order in orders.values()}) > 1
    pool, state = weights(cram), copy.deepcopy(method.export_state().tensors)
    method.end_task()
    moved, found = weights(cram), method.export_state().tensors
    for path, order in orders.items():
        assert order[:4] == [0, 1, 2, 3]
        assert torch.equal(found[f"{path}.routers"], state[f"{path}.routers"][:, order])
        for index, source in enumerate(order):
            assert torch.equal(moved[index][path][1], pool[source][path][1])
    assert len(found["keys.image"]) == 3 and method._keys.trained == []


def test_third_task_trains_four_branches(learnt: Any) -> None:
    model = copy.deepcopy(learnt.model)
    method, cram = model.cram.method, model.cram
    old = weights(cram)
    method.begin_task("third", 3)
    assert all(module.experts.trained == 4 and module.experts.shared_a for module in cram.modules.values())
    now = weights(cram)
    for path in cram.modules:
        assert all(torch.equal(a[path][1], b[path][1]) for a, b in zip(old, now, strict=True))
    parameters = method.before_step(0)
    shapes = sorted(tuple(p.shape) for p in parameters)
    gatings = [module.gating for module in cram.modules.values()]
    assert {id(p) for p in parameters} >= {id(g.router) for g in gatings}
    assert len(parameters) == 3 * len(cram.modules) + 2 and shapes[0][0] == 1


def test_training_routes_by_the_task_in_training_and_inference_by_keys(learnt: Any) -> None:
    model = copy.deepcopy(learnt.model)
    method, encoder = model.cram.method, model.cram.encoder
    keys = method.export_state().tensors
    samples = [
        Query(keys["keys.text"][t : t + 1], keys["keys.image"][t : t + 1], torch.tensor([True]))
        for t in (0, 1)
    ]
    assert [int(method.route(sample, False).features) for sample in samples] == [0, 1]
    assert [int(method.route(sample, True).features) for sample in samples] == [0, 1]
    assert method.extra_loss(ForwardState()) is None
    method.begin_task("third", 3)
    assert [int(method.route(sample, True).features) for sample in samples] == [2, 2]
    route = method.route(samples[1], True)
    torch.testing.assert_close(method.extra_loss(ForwardState(route)), method._keys.loss(samples[1]))
    assert keys["keys.image"].shape == (2, encoder.image_dim)


def test_a_loaded_pool_shares_its_a(learnt: Any, tmp_path: Path) -> None:
    save(learnt.model, tmp_path / "b")
    clip = factories.clip_model()
    model = factories.llava(clip=clip)
    cram = load(model, tmp_path / "b", factories.clip_encoder(model, clip), learnt.processor)
    assert all(module.experts.shared_a for module in cram.modules.values())
    found, expected = cram.method.export_state().tensors, learnt.method.export_state().tensors
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_state_of_another_number_of_tasks_or_width_is_refused(learnt: Any) -> None:
    model = copy.deepcopy(learnt.model)
    method, good = model.cram.method, learnt.method.export_state().tensors
    name = next(iter(good))
    for bad, message in (
        ({**good, name: good[name][:1]}, r"must have shape \[2, 8, \d+\], got \[1, 8"),
        ({**good, "keys.image": good["keys.image"][:, 1:]}, "keys.image must have shape"),
        ({k: v for k, v in good.items() if k != name}, "missing"),
        ({}, "missing"),
    ):
        with pytest.raises(ValueError, match=message):
            method.import_state(bad, {})
    assert all(torch.equal(method.export_state().tensors[key], good[key]) for key in good)


def test_unequal_a_cannot_be_loaded(learnt: Any) -> None:
    model = copy.deepcopy(learnt.model)
    cram = model.cram
    pool = weights(cram)
    path = next(iter(cram.modules))
    pool[3][path] = (pool[3][path][0] + 1, pool[3][path][1])
    cram.set_experts(BRANCHES, pool, 0)
    with pytest.raises(ValueError, match="branches must share one A"):
        cram.method.import_state(learnt.method.export_state().tensors, {})
    cram.set_experts(BRANCHES[:3], pool[:3], 0)
    with pytest.raises(ValueError, match="branches must be 8, got 3 experts"):
        cram.method.import_state(learnt.method.export_state().tensors, {})
