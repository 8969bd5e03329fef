"""KeepLoRA: gradients of the weights by hooks, directions that are chosen and kept, A fixed and B trained."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cram.learning.batches import training_batch
from cram.learning.training import answer_loss, training_mode
from cram.methods.parts.gradients import WeightGradients
from tests.cram import runs
from tests.cram.methods.parts.test_directions import orthonormal

STEPS = 5  # of runs.config(): gradients in the first and in the last one


def backward(model: Any, examples: list[Any]) -> None:
    """Two forwards of one sample each."""
    for example in examples:
        batch, labels = training_batch([example], 0)
        answer_loss(model, batch, labels).backward()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_sums_are_the_gradients_of_the_base_weights(tmp_path: Path, checkpointing: bool) -> None:
    made = runs.learner(tmp_path, "keeplora", dropout=0.0)
    model, cram = made.model, made.cram
    made.learn(0)
    made.method.begin_task("again", STEPS)
    gradients = WeightGradients(cram.modules)
    gradients.start()
    examples = [made._tests["colour"].example(index) for index in range(2)]
    with training_mode(model, checkpointing):
        backward(model, examples)
    found = gradients.stop()
    assert not gradients.gathering and not gradients.sums
    for module in cram.modules.values():
        module.base.weight.requires_grad_(True)
        # The base alone, with the first task merged: autograd knows its gradient.
        a, b = module.factors([0])[0]
        module.base.weight.data += cram.config.scale * b @ a
    with cram.disabled():
        backward(model, examples)
    for path, module in cram.modules.items():
        torch.testing.assert_close(found[path], module.base.weight.grad, atol=1e-6, rtol=1e-3)
        assert found[path].abs().max() > 1e-4


def spaces(made: Any) -> dict[str, Tensor]:
    return {path: made.method._space(path) for path in made.cram.modules}


def test_a_task_trains_b_alone_outside_of_what_is_in_use(tmp_path: Path) -> None:
    made = runs.learner(tmp_path, "keeplora")
    before = spaces(made)
    made.learn(0)
    between = spaces(made)
    made.learn(1)
    for path in made.cram.modules:
        orthonormal(between[path])
        assert len(before[path]) < len(between[path]) <= len(spaces(made)[path])
        for index, space in enumerate((before, between)):
            a, b = made.cram.expert_weights(index)[path]
            orthonormal(a)
            assert (a @ space[path].mT).abs().max() < 1e-4
            assert b.abs().max() > 1e-3
    assert made.cram.state is not None and made.method.route(None, False).gates.eq(1).all()


def test_only_b_gets_a_gradient(tmp_path: Path) -> None:
    made = runs.learner(tmp_path, "keeplora")
    made.method.begin_task("colour", STEPS)
    trained = made.method.before_step(0)
    assert trained is not None and len(trained) == len(made.cram.modules)
    assert all(
        p.shape == (made.config.rank, m.out_features)
        for p, m in zip(trained, made.cram.modules.values(), strict=True)
    )
    made.method.release()


def test_a_task_without_a_step_for_b_is_refused(tmp_path: Path) -> None:
    made = runs.learner(tmp_path, "keeplora")
    with pytest.raises(ValueError, match="task 'colour' must have at least 2 steps, got 1"):
        made.method.begin_task("colour", 1)


@pytest.mark.parametrize(
    "wrong", [{"nowhere": torch.ones(1, 3)}, {"first": torch.ones(1, 3)}, {"first": torch.ones(0, 0)}]
)
def test_a_state_that_does_not_fit_is_refused(wrong: dict[str, Tensor], tmp_path: Path) -> None:
    made = runs.learner(tmp_path, "keeplora")
    first = next(iter(made.cram.modules))
    with pytest.raises(ValueError, match=r"method state .* must be \[k, "):
        made.method.import_state({name.replace("first", first): rows for name, rows in wrong.items()}, {})


def test_a_training_without_a_tensor_or_of_another_shape_is_refused(tmp_path: Path) -> None:
    made = runs.learner(tmp_path, "keeplora")
    made.method.begin_task("colour", STEPS)
    tensors, values = made.method.export_training()
    for name in [name for name, tensor in tensors.items() if tensor.numel()]:
        wanted = list(tensors[name].shape)
        lacking = {other: tensor for other, tensor in tensors.items() if other != name}
        for wrong, got in ((lacking, "none"), ({**tensors, name: torch.ones(1, 1)}, "[1, 1]")):
            made.cram.set_experts([], [], 0)
            message = re.escape(f"{name} of the checkpoint must have shape {wanted}, got {got}")
            with pytest.raises(ValueError, match=f"^{message}$"):
                made.method.import_training("colour", STEPS, wrong, values)
