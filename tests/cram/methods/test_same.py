"""SAME: the steps of the released hooks, gates, what is trained, and what is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cram.methods.parts.task import mixing
from cram.methods.parts.task.curvature import ENERGY, damped, leading, preconditioned
from cram.methods.parts.task.mixing import MixingRouter, spread
from cram.methods.same import SameMethod
from cram.model.state import ForwardState
from tests.cram import runs

WIDTH, TOKENS = 6, 4


def orthonormal(width: int, count: int) -> Tensor:
    return torch.linalg.qr(torch.randn(width, count, dtype=torch.float64))[0]


def test_a_gradient_is_preconditioned_by_the_inverse_of_the_covariance() -> None:
    basis, scales, mu = orthonormal(8, 4), torch.tensor([4.0, 2.0, 1.0, 0.1], dtype=torch.float64), 0.9
    gradient = torch.randn(3, 8, dtype=torch.float64)
    count = leading(scales)
    assert count == 2  # 16 of 21.01 is below 0.9, 20 of 21.01 is above
    u = basis[:, :count]
    matrix = u @ torch.diag(1 / (scales[:count] + mu)) @ u.mT + (torch.eye(8) - u @ u.mT) / mu
    torch.testing.assert_close(preconditioned(gradient, basis, scales, mu), gradient @ matrix)


def test_a_router_s_gradient_is_shorter_along_wide_directions_alone() -> None:
    basis, scales = orthonormal(8, 4), torch.tensor([4.0, 3.9, 2.0, 0.1], dtype=torch.float64)
    count = leading(scales)
    assert count == 3
    smooth = torch.stack([scales[:1].mean(), scales[:2].mean(), scales[:3].mean()])
    factors = (1 / (smooth + 1e-6)) / (1 / (smooth + 1e-6)).max()
    assert factors[0] < 0.9 and factors[2] == 1.0
    gradient = torch.randn(5, 8, dtype=torch.float64)
    u = basis[:, :count]
    expected = gradient - gradient @ u @ u.mT + gradient @ u @ torch.diag(factors.clamp(0.8, 1.2)) @ u.mT
    torch.testing.assert_close(damped(gradient, basis, scales, 3, 0.2), expected)
    outside = torch.randn(5, 8, dtype=torch.float64)
    outside -= outside @ u @ u.mT
    torch.testing.assert_close(damped(outside, basis, scales, 3, 0.2), outside)


def test_without_a_look_gradients_stay() -> None:
    gradient = torch.randn(2, 4)
    for step in (damped(gradient, torch.zeros(4, 2), torch.zeros(2), 3, 0.2),
                 preconditioned(gradient, torch.zeros(4, 2), torch.zeros(2), 0.9)):  # fmt: skip
        assert torch.equal(step, gradient)
    assert leading(torch.tensor([1.0, 0.0])) == 1 and ENERGY == 0.9


def router(experts: int, count: int = 3) -> MixingRouter:
    """A router in training with `experts` experts."""
    made = MixingRouter("a.q_proj", WIDTH)
    for number in range(1, experts + 1):
        made.begin(number)
    return made.train()


def test_gates_in_training_are_means_without_the_frozen_experts() -> None:
    made, x = router(3), torch.randn(2, TOKENS, WIDTH)
    mask = torch.tensor([[True] * TOKENS, [False, True, True, True]])
    made.active = torch.tensor([1.0, 0.0, 1.0])
    gates = made(x, torch.ones(1, 3), ForwardState(mask=mask))
    shares = torch.softmax(x @ made.weight.T, -1)
    means = torch.stack([shares[0].mean(0), shares[1, 1:].mean(0)])
    means[:, 1] = 0
    torch.testing.assert_close(gates, means / means.sum(1, keepdim=True))
    assert gates.requires_grad


def test_gates_of_a_test_are_the_two_largest_of_a_flat_softmax() -> None:
    made, x = router(4).eval(), torch.randn(3, TOKENS, WIDTH)
    gates = made(x, torch.ones(1, 4), ForwardState())
    means = torch.softmax(x @ made.weight.T / 4, -1).mean(1)
    top = means.topk(2)
    expected = torch.zeros(3, 4).scatter(1, top.indices, top.values / top.values.sum(1, keepdim=True))
    torch.testing.assert_close(gates, expected)
    assert (gates > 0).sum(1).eq(2).all()


@pytest.mark.parametrize("forwards", [1, 2])
def test_two_steps_find_the_directions_of_the_inputs(forwards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixing, "COMPONENTS", 2)
    made = router(1)
    wide = orthonormal(WIDTH, 2).float()
    seen = []
    for _ in range(2):
        x = (torch.randn(400, 2) * torch.tensor([5.0, 2.0])) @ wide.T + torch.randn(WIDTH)
        seen.append(x)
        for part in x.chunk(forwards):
            made(part[None], torch.ones(1, 1), ForwardState())
        made.end_step()
    torch.testing.assert_close(made.new_basis @ made.new_basis.T, wide @ wide.T, atol=1e-3, rtol=0)
    torch.testing.assert_close(made.new_scales, (seen[1] @ made.new_basis).std(0), atol=1e-3, rtol=1e-3)
    made.finish()
    assert torch.equal(made.basis, made.new_basis) and made.scales.any()


def test_directions_wait_for_their_deviations(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task whose last step finds new directions keeps the older ones, whose deviations are known."""
    monkeypatch.setattr(mixing, "EVERY", 3)
    made = router(1)
    for step in range(4):
        x = torch.randn(20, WIDTH) * torch.linspace(1, 1 + step, WIDTH)
        made(x[None], torch.ones(1, 1), ForwardState())
        made.end_step()
        if step == 1:
            known = made.new_basis.clone(), made.new_scales.clone()
    assert not torch.equal(made.found_basis, known[0])
    assert torch.equal(made.new_basis, known[0]) and torch.equal(made.new_scales, known[1])


def test_samples_that_stand_in_are_not_gathered() -> None:
    made, state = router(1), ForwardState()
    state.counted = False
    made(torch.randn(2, 4, WIDTH), torch.ones(2, 1), state)
    assert not made.sums.any()


def test_an_older_expert_with_much_energy_and_little_use_rests() -> None:
    made = router(3)
    made.use, made.importance = torch.tensor([0.2, 0.6, 0.2]), torch.tensor([3.0, 1.0, 9.0])
    made._freeze()
    # Use less importance: 0 - 0.25, 1 - 0, and the newest, which always stays.
    assert made.active.tolist() == [0.0, 1.0, 1.0]
    made.use = torch.tensor([0.6, 0.1, 0.2])
    made._freeze()
    assert made.active.tolist() == [1.0, 0.0, 1.0]
    made.active = torch.tensor([0.0, 0.0, 1.0])
    made._freeze()
    assert made.active.tolist() == [0.0, 0.0, 1.0]
    assert spread(torch.ones(3)).tolist() == [0.0] * 3


def test_every_task_adds_an_expert_and_trains_all(tmp_path: Path) -> None:
    made = runs.learner(tmp_path, "same")
    made.learn(0)
    first = made.cram.expert_weights(0)
    path, module = next(iter(made.cram.modules.items()))
    directions = module.gating.basis.clone()
    assert directions.any() and module.gating.scales.any()
    made.learn(1)
    assert made.cram.expert_names == ["colour", "letter"]
    assert not torch.equal(made.cram.expert_weights(0)[path][0], first[path][0])
    assert module.gating.weight.shape == (2, module.in_features) and not module.gating.weight.requires_grad
    assert not torch.equal(module.gating.basis, directions)


def test_the_second_task_s_gradients_of_a_are_preconditioned(tmp_path: Path) -> None:
    made = runs.learner(tmp_path, "same")
    made.learn(0)
    method = made.method
    assert isinstance(method, SameMethod)
    method.begin_task("letter", 5)
    for module in made.cram.modules.values():
        a = module.experts.trained_a
        gradient = torch.randn_like(a)
        (a * gradient).sum().backward()
        expected = preconditioned(gradient, module.gating.basis, module.gating.scales, 0.9)
        torch.testing.assert_close(a.grad, expected)
        assert not torch.equal(a.grad, gradient)


@pytest.mark.parametrize(("steps", "free"), [(0, True), (9, True), (10, False)])
def test_the_first_ten_steps_leave_the_routers_gradients(steps: int, free: bool, tmp_path: Path) -> None:
    made = runs.learner(tmp_path, "same")
    made.method.begin_task("colour", 20)
    for module in made.cram.modules.values():
        gating = module.gating
        gating.new_basis.copy_(orthonormal(*gating.new_basis.shape))
        gating.new_scales.copy_(torch.linspace(4, 1, len(gating.new_scales)))
        for _ in range(steps):
            gating.end_step()
        gradient = torch.randn_like(gating.weight)
        (gating.weight * gradient).sum().backward()
        expected = damped(gradient, gating.new_basis, gating.new_scales, 3, 0.2)
        assert not torch.equal(expected, gradient)
        assert torch.equal(gating.weight.grad, gradient if free else expected)


def test_the_end_of_a_task_takes_up_its_last_step(tmp_path: Path) -> None:
    made = runs.learner(tmp_path, "same")
    made.method.begin_task("colour", 5)
    energies = {}
    for path, module in made.cram.modules.items():
        x = torch.randn(1, TOKENS, module.in_features)
        module.gating.train()(x, torch.ones(1, 1), ForwardState())
        energies[path] = x.square().sum(-1).mean()
    made.method.end_task()
    for path, module in made.cram.modules.items():
        expected = (0.95 + 0.05 * energies[path])[None]
        torch.testing.assert_close(module.gating.importance, expected)


def test_a_state_of_other_shapes_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    made = runs.learner(tmp_path, "same")
    made.learn(0)
    state = made.method.export_state().tensors
    name = next(name for name in state if name.endswith(".weight"))
    before = made.method.export_state().tensors
    with pytest.raises(ValueError, match=r"must have shape \[1, "):
        made.method.import_state({**state, name: torch.zeros(2, state[name].shape[1])}, {})
    assert all(torch.equal(tensor, before[key]) for key, tensor in made.method.export_state().tensors.items())
