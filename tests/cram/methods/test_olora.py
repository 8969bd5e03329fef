"""O-LoRA: the loss of the released code with its gradients, and all LoRAs adding up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cram.config import CramConfig
from cram.methods.olora import overlap
from tests.cram import runs
from tests.cram.golden_cases import assert_complete, golden_names, load


def test_every_case_is_tested() -> None:
    assert_complete("olora_loss", {"basic", "gas_l2", "zeroB_fp64"})
    assert_complete("olora_penalty_prism", {"t0", "t2"})


@pytest.mark.parametrize("name", golden_names("olora_loss"))
def test_the_loss_is_that_of_the_released_code(name: str) -> None:
    """With the released code's norm term, which the method leaves out, and its weights."""
    case, data = load("olora_loss", name)
    settings = case["config"]
    leaves = {key: data[key].clone().requires_grad_() for key in data if "param." in key and "loranew" in key}
    linear = sum((leaf * data[key.replace("param.", "in.base_grad.")]).sum() for key, leaf in leaves.items())
    start = sum(
        (leaf.detach() * data[key.replace("param.", "in.base_grad.")]).sum() for key, leaf in leaves.items()
    )
    base = data["in.base_loss"] + linear - start
    terms = [
        overlap(data[f"param.{module['name']}.lora_A"], leaves[f"param.{module['name']}.loranew_A"])
        for module in settings["modules"]
        if module["r_old"]
    ]
    norms = sum(torch.linalg.vector_norm(leaf) for leaf in leaves.values())
    loss = base / settings["gradient_accumulation_steps"]
    loss = loss + settings["lambda_1"] * torch.stack(terms).sum() + settings["lambda_2"] * norms
    loss.backward()
    exact = settings["dtype"] == "float64"
    budget = {"atol": 1e-10, "rtol": 1e-9} if exact else {"atol": 2e-5, "rtol": 1e-4}
    torch.testing.assert_close(loss.detach(), data["out.loss"], **budget)
    for key, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, data[key.replace("param.", "grad.")], **budget)


def test_the_default_weight_is_the_released_one() -> None:
    case, _ = load("olora_loss", "basic")
    assert case["config"]["lambda_1"] == CramConfig().overlap_weight


def test_the_penalty_is_that_of_another_port() -> None:
    assert load("olora_penalty_prism", "t0")[0]["expected"]["penalty"] is None
    case, data = load("olora_penalty_prism", "t2")
    task = case["config"]["cur_task"]
    factors: list[Tensor] = [
        data[f"param.m{i}.A"].clone().requires_grad_() for i in range(case["config"]["n_modules"])
    ]
    total = torch.stack([overlap(a[:task].detach().flatten(0, 1), a[task]) for a in factors]).sum()
    total.backward()
    torch.testing.assert_close(total.detach(), data["out.orth_sum"], atol=2e-5, rtol=1e-4)
    for index, a in enumerate(factors):
        torch.testing.assert_close(a.grad, data[f"grad.m{index}.A"], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("weight", [0.5, 0.05])
def test_the_first_task_has_no_penalty_and_older_loras_stay(tmp_path: Path, weight: float) -> None:
    made = runs.learner(tmp_path / "run", "olora", overlap_weight=weight)
    cram, method = made.cram, made.method
    method.begin_task("colour", 5)
    assert method.extra_loss(cram.state) is None
    method.end_task()
    old = cram.expert_weights(0)
    method.begin_task("letter", 5)
    new = cram.expert_weights(1)
    expected = sum((old[path][0] @ new[path][0].T).abs().sum() for path in cram.modules)
    loss = method.extra_loss(cram.state)
    assert loss is not None
    torch.testing.assert_close(loss.detach(), weight * expected)
    loss.backward()
    with torch.no_grad():
        for parameter in cram.trainable_parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad.sign()
    after = method.extra_loss(cram.state)
    assert after is not None and after < loss
    assert all(torch.equal(a, old[path][0]) for path, (a, _) in cram.expert_weights(0).items())
    assert method.route(None, False).gates.tolist() == [[[1.0, 1.0]]] * cram.num_layers
