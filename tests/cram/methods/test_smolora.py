"""SMoLoRA: the layer of the released code, where gates come from, and what is trained."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cram
from cram.methods.base import Method
from cram.methods.parts.separable import HALF, SeparableGating, fused_gates, fusion_rows
from cram.methods.smolora import EXPERTS, SMoLoraMethod
from cram.model.gating import token_means
from cram.model.linear import ExpertLinear
from cram.model.state import Current, ForwardState
from cram.routing.query import Query, Route
from cram_kernels import expert_lora, pack_experts
from tests.cram import factories, runs
from tests.cram.golden_cases import assert_complete, golden_names, load


def test_every_case_is_tested() -> None:
    assert_complete("smolora_layer", {"sq_e8", "rect_e4_bias", "e6_t1", "fp64", "prism_runtime"})


def instruction_features(case: dict[str, Any], data: dict[str, Tensor]) -> Tensor:
    """[S, F]: one a sample, or the one of the case's task for all."""
    if "in.instruction_features" in data:
        return data["in.instruction_features"]
    return data["in.instruction_embeddings"][case["config"]["ins_type"]][None]


@pytest.mark.parametrize("impl", ["reference", "cpu", "auto"])
@pytest.mark.parametrize("name", golden_names("smolora_layer"))
def test_the_layer_is_that_of_the_released_code(name: str, impl: str) -> None:
    case, data = load("smolora_layer", name)
    a, b = data["param.lora_A"], data["param.lora_B"]
    experts = pack_experts(list(a), list(b), case["config"]["scaling"], trained=len(a))
    fusion = torch.cat([data["param.fc_vu"], data["param.fc_if"]]).requires_grad_()
    x = data["in.x"].clone().requires_grad_()
    visual = (token_means(x, None) @ data["param.vu_gate"].t()).argmax(1)
    instruction = (instruction_features(case, data) @ data["param.ins_gate"].t()).argmax(1)
    chosen = torch.stack([visual, len(a) // 2 + instruction.expand(len(x))], 1)
    used = F.one_hot(chosen, len(a)).sum(1)
    assert torch.equal(used, data["out.router"][:, 0])
    gates = fused_gates(x, used == 0, fusion_rows(experts, fusion))
    y = expert_lora(x, data["param.weight"], data.get("param.bias"), experts, gates, impl=impl)
    exact = x.dtype == torch.float64
    budget = {"atol": 1e-10, "rtol": 1e-9} if exact else {"atol": 2e-5, "rtol": 1e-4}
    weights = gates.view(*x.shape[:2], 2, -1).sum(-1)
    torch.testing.assert_close(weights, data["out.fusion_weights"], **budget)
    torch.testing.assert_close(y, data["out.y"], **budget)
    (y * data["in.functional"]).sum().backward()
    assert experts.trained_a is not None and experts.trained_b is not None
    found = {
        "x": x.grad,
        "lora_A": experts.trained_a.grad.view(a.shape),
        "lora_B": experts.trained_b.grad.view(len(b), -1, b.shape[1]).mT,
        "fc_vu": fusion.grad[:1],
        "fc_if": fusion.grad[1:],
    }
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, data[f"grad.{key}"], **budget)


def gated_linear() -> tuple[ExpertLinear, Current]:
    """A linear of 8 experts of rank 2 with a gating that has been drawn."""
    current = Current()
    linear = ExpertLinear(nn.Linear(6, 5).requires_grad_(False), 0, "a.q_proj", current, 0.0)
    linear.set_experts([(torch.randn(2, 6), torch.randn(5, 2)) for _ in EXPERTS], 2.0, len(EXPERTS))
    gating = SeparableGating(linear, 3)
    gating.reset()
    linear.gating = gating
    return linear, current


def begin(current: Current, features: Tensor, **settings: Any) -> None:
    route = Route(torch.ones(1, len(features), len(EXPERTS)), features=features)
    current.state = ForwardState(route, **settings)


def test_a_module_is_the_formula() -> None:
    linear, current = gated_linear()
    gating, x, features = linear.gating, torch.randn(4, 7, 6), torch.randn(2, 3)
    mask = torch.arange(7)[None] >= torch.tensor([0, 3, 0, 5])[:, None]
    begin(current, features, mask=mask)
    y = linear(x)
    for row in range(4):
        kept = x[row, mask[row]]
        v = int((kept.mean(0) @ gating.visual_router.t()).argmax())
        i = HALF + int((features[row // 2] @ gating.instruction_router.t()).argmax())
        u, f = (2.0 * x[row] @ a.t() @ b.t() for a, b in (linear.experts.expert(e) for e in (v, i)))
        alpha, beta = torch.stack([u @ gating.fusion[0], f @ gating.fusion[1]]).softmax(0)[:, :, None]
        expected = F.linear(x[row], linear.base.weight, linear.base.bias) + alpha * u + beta * f
        torch.testing.assert_close(y[row], expected, atol=1e-5, rtol=1e-5)


def test_padding_changes_no_token() -> None:
    linear, current = gated_linear()
    x, features = torch.randn(1, 4, 6), torch.randn(1, 3)
    begin(current, features)
    alone = linear(x)
    padded = torch.cat([torch.full((1, 3, 6), 50.0), x], 1)
    begin(current, features, mask=torch.tensor([[False] * 3 + [True] * 4]))
    torch.testing.assert_close(linear(padded)[:, 3:], alone, atol=1e-6, rtol=1e-5)


def test_a_decode_step_keeps_the_experts_and_fuses_its_own_token() -> None:
    linear, current = gated_linear()
    x, features = torch.randn(2, 5, 6), torch.randn(2, 3)
    begin(current, features)
    linear(x)
    memory = current.state.memory
    step = -x.mean(1, keepdim=True)  # alone it would choose other visual experts
    route = Route(torch.ones(1, 2, 8), features=features, memory=memory)
    current.state = ForwardState(route, decoding=True)
    gates = linear.gating(step, torch.ones(2, 8), current.state)
    others = memory["a.q_proj.others"]
    assert torch.equal(gates == 0, others) and torch.equal(others.sum(1), torch.full((2,), 6))
    torch.testing.assert_close(gates.sum(1), torch.ones(2))
    expected = fused_gates(step, others, fusion_rows(linear.experts, linear.gating.fusion))
    torch.testing.assert_close(gates, expected)
    alone = (token_means(step, None) @ linear.gating.visual_router.t()).argmax(1)
    assert others.gather(1, alone[:, None]).all()


def test_frozen_rows_are_folded_once_for_what_they_were_made_from() -> None:
    linear, current = gated_linear()
    gating, x, features = linear.gating, torch.randn(2, 3, 6), torch.randn(2, 3)
    linear.experts = linear.experts.freeze()
    gating.requires_grad_(False)
    begin(current, features)

    def rows() -> Tensor:
        linear(x)
        return gating._rows(linear.experts, current.state)

    first = rows()
    assert rows() is first and "a.q_proj.rows" not in current.state.memory
    gating.load_state_dict({**gating.state_dict(), "fusion": torch.randn_like(gating.fusion)})
    torch.testing.assert_close(rows(), fusion_rows(linear.experts, gating.fusion))
    linear.set_experts([(torch.randn(2, 6), torch.randn(5, 2)) for _ in EXPERTS], 2.0, 0)
    torch.testing.assert_close(rows(), fusion_rows(linear.experts, gating.fusion))


def test_copies_read_their_own_experts() -> None:
    linear, _ = gated_linear()
    copied = copy.deepcopy(linear)
    assert copied.gating._linear[0] is copied and "gating._linear" not in dict(copied.named_modules())


def test_every_task_trains_experts_and_fusion_and_no_router(tmp_path: Path) -> None:
    """A hard gate has no gradient, so the routers of the released code stay as they start, and so do ours."""
    made = runs.learner(tmp_path / "run", "smolora")
    cram = made.cram
    made.learn(0)
    first = copy.deepcopy({path: module.gating.state_dict() for path, module in cram.modules.items()})
    pools = [cram.expert_weights(index) for index in range(len(EXPERTS))]
    made.learn(1)
    moved = [False] * len(EXPERTS)
    for path, module in cram.modules.items():
        found = module.gating.state_dict()
        assert (
            torch.equal(found["visual_router"], first[path]["visual_router"]) and found["visual_router"].any()
        )
        assert torch.equal(found["instruction_router"], first[path]["instruction_router"])
        assert not torch.equal(found["fusion"], first[path]["fusion"])
        for index in range(len(EXPERTS)):
            moved[index] |= not torch.equal(cram.expert_weights(index)[path][1], pools[index][path][1])
    assert any(moved[:HALF]) and any(moved[HALF:])
    assert cram.expert_names == list(EXPERTS)
    made.evaluate(0)
    made.evaluate(1)
    total = made._report()["methods"]["smolora"]["parameters"]["total"]
    packs = [module.experts for module in cram.modules.values()]
    fusions = sum(module.gating.fusion.numel() for module in cram.modules.values())
    assert total == sum(pack.a.numel() + pack.bt.numel() for pack in packs) + fusions


def queries(method: Method, *texts: list[float]) -> Query:
    """Queries whose text features begin with the given values."""
    encoder = method.cram.encoder
    text = torch.zeros(len(texts), encoder.text_dim)
    text[:, : len(texts[0])] = torch.tensor(texts)
    image = torch.zeros(len(texts), encoder.image_dim)
    return Query(text, image, torch.ones(len(texts), dtype=torch.bool))


def test_instruction_types_are_the_means_of_the_tasks_and_the_nearest_one_is_taken(tmp_path: Path) -> None:
    method = runs.learner(tmp_path / "run", "smolora", instruction_types=True).method
    assert isinstance(method, SMoLoraMethod)
    method.begin_task("one", 5)
    first = queries(method, [1.0, 0.0], [3.0, 0.0])
    features = method.route(first, training=True).features
    assert features is not None and features[:, 0].tolist() == [2.0, 2.0], "the first batch's own mean"
    method.observe(first)
    method.observe(queries(method, [5.0, 0.0]))
    features = method.route(queries(method, [9.0, 9.0]), training=True).features
    assert features is not None and features[:, :2].tolist() == [[3.0, 0.0]]
    method.end_task()
    method.begin_task("two", 5)
    method.observe(queries(method, [0.0, 4.0]))
    method.end_task()
    features = method.route(queries(method, [2.0, 1.0], [1.0, 2.0]), training=False).features
    assert features is not None and features[:, :2].tolist() == [[3.0, 0.0], [0.0, 4.0]]


def test_without_instruction_types_each_sample_has_its_own_feature(tmp_path: Path) -> None:
    method = runs.learner(tmp_path / "run", "smolora").method
    method.begin_task("one", 5)
    query = queries(method, [1.0, 0.0], [3.0, 0.0])
    for training in (True, False):
        features = method.route(query, training).features
        assert features is not None and torch.equal(features, query.text)
    assert "instruction_types" not in method.export_state().tensors and not method.training_means()


def test_instruction_types_are_saved_and_checked(tmp_path: Path) -> None:
    made = runs.learner(tmp_path / "run", "smolora", instruction_types=True)
    made.learn(0)
    training = made.method
    cram.save(made.model, tmp_path / "bundle")
    plain = factories.llava(clip=factories.clip_model())
    loaded = cram.load(plain, tmp_path / "bundle", made.cram.encoder, made.processor)
    types = loaded.method.export_state().tensors["instruction_types"]
    assert len(types) == 1 and types.abs().max() > 0
    assert torch.equal(types, training.export_state().tensors["instruction_types"])
    state = loaded.method.export_state().tensors
    with pytest.raises(ValueError, match=r"instruction_types must have shape \[tasks, .*got none"):
        loaded.method.import_state({n: t for n, t in state.items() if n != "instruction_types"}, {})
    other = {**state, "instruction_types": torch.ones_like(types)}
    with pytest.raises(ValueError, match="missing"):
        loaded.method.import_state({n: t for n, t in other.items() if "fusion" not in n}, {})
    assert torch.equal(loaded.method.export_state().tensors["instruction_types"], types)


def test_a_checkpoint_holds_the_moving_instruction_type(tmp_path: Path) -> None:
    method = runs.learner(tmp_path / "run", "smolora", instruction_types=True).method
    method.begin_task("one", 5)
    method.before_step(0)
    method.observe(queries(method, [1.0, 0.0], [3.0, 0.0]))
    tensors, values = method.export_training()
    again = runs.learner(tmp_path / "again", "smolora", instruction_types=True).method
    again.import_training("one", 5, tensors, values)
    assert again.export_state().tensors["instruction_types"][0, 0] == 2.0
    for each in (method, again):
        each.observe(queries(method, [8.0, 0.0]))
    types = [each.export_state().tensors["instruction_types"] for each in (method, again)]
    assert torch.equal(*types) and types[0][0, 0] == 4.0
