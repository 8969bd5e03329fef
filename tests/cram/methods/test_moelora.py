"""MoELoRA: the layer of the released code, and what is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cram.methods.moelora import EXPERTS, TokenRouter
from cram.model.state import ForwardState
from cram_kernels import expert_lora, pack_experts
from tests.cram import runs
from tests.cram.golden_cases import assert_complete, golden_names, load


def test_every_case_is_tested() -> None:
    assert_complete("moelora_layer", {"sq", "rect_sharp", "fp64"})


@pytest.mark.parametrize("name", golden_names("moelora_layer"))
def test_the_layer_is_that_of_the_released_code(name: str) -> None:
    case, data = load("moelora_layer", name)
    a, b = data["param.lora_A"], data["param.lora_B"]
    experts = pack_experts(list(a), list(b), case["config"]["scaling"], trained=len(a))
    router = TokenRouter(a.shape[2], len(a))
    router.weight.data = data["param.router"].clone()
    router.requires_grad_(True)
    x = data["in.x"].clone().requires_grad_()
    gates = router(x, torch.ones(1, len(a)), ForwardState())
    y = expert_lora(x, data["param.weight"], data.get("param.bias"), experts, gates)
    exact = x.dtype == torch.float64
    budget = {"atol": 1e-10, "rtol": 1e-9} if exact else {"atol": 2e-5, "rtol": 1e-4}
    torch.testing.assert_close(y, data["out.y"], **budget)
    (y * data["in.functional"]).sum().backward()
    assert experts.trained_a is not None and experts.trained_b is not None
    found = {
        "x": x.grad,
        "router": router.weight.grad,
        "lora_A": experts.trained_a.grad.view(a.shape),
        "lora_B": experts.trained_b.grad.view(len(b), -1, b.shape[1]).mT,
    }
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, data[f"grad.{key}"], **budget)


def test_every_task_trains_all_experts_and_routers_further(tmp_path: Path) -> None:
    made = runs.learner(tmp_path / "run", "moelora")
    cram = made.cram
    torch.manual_seed(0)
    made.method.begin_task("colour", 5)
    for module in cram.modules.values():
        bound = module.in_features**-0.5
        assert 0.8 * bound < module.gating.weight.abs().max() <= bound
    cram.set_experts([], [], 0)
    made.learn(0)
    first = [cram.expert_weights(index) for index in range(len(EXPERTS))]
    routers = {path: module.gating.weight.clone() for path, module in cram.modules.items()}
    assert all(bool(router.any()) for router in routers.values())
    made.learn(1)
    assert cram.expert_names == list(EXPERTS) and len(EXPERTS) == 8
    for path, module in cram.modules.items():
        assert not torch.equal(module.gating.weight, routers[path])
        for index, weights in enumerate(first):
            assert not torch.equal(cram.expert_weights(index)[path][1], weights[path][1])
    factors = sum(m.experts.a.numel() + m.experts.bt.numel() for m in cram.modules.values())
    made.evaluate(0)
    made.evaluate(1)
    parameters = made._report()["methods"]["moelora"]["parameters"]
    assert parameters["per_task"]["letter"] == 0
    assert parameters["total"] == factors + sum(router.numel() for router in routers.values())
