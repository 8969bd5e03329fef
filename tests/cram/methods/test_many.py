"""MAny: what acts in training and at inference, what is stored, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cram import attach
from cram.bundle.export import export_lora, merge
from cram.methods.many import RHO, ManyMethod
from cram.model.attached import AttachedModel
from tests.cram import factories, runs

MODELS = ("llava", "qwen2_5_vl", "internvl")


def learnt(family: str, tasks: int = 2) -> tuple[Any, AttachedModel]:
    """A model of a family after tasks whose LoRAs are random."""
    clip = factories.clip_model()
    model = factories.llava(clip=clip) if family == "llava" else factories.MODELS[family]()
    cram = attach(model, runs.config(method="many", dropout=0.0), factories.clip_encoder(model, clip))
    for task in range(tasks):
        learn(cram, f"task{task}")
    return model.eval(), cram


def learn(cram: AttachedModel, task: str) -> None:
    cram.method.begin_task(task, 5)
    randomise(cram)
    cram.method.end_task()


def randomise(cram: AttachedModel) -> None:
    parameters = cram.method.before_step(0)
    assert parameters is not None
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.3 * torch.randn_like(parameter))


def logits(model: Any, family: str, images: int = 0) -> Tensor:
    with torch.no_grad():
        return model(**factories.inputs(family, images=images, rows=2)).logits


def folded(model: Any, family: str, cram: AttachedModel, updates: dict[str, Tensor]) -> Tensor:
    """Logits of the base model with an update [D_out, D_in] added to every adapted weight."""
    kept = {path: module.base.weight.clone() for path, module in cram.modules.items()}
    for path, module in cram.modules.items():
        module.base.weight += updates[path]
    with cram.disabled():
        found = logits(model, family)
    for path, module in cram.modules.items():
        module.base.weight.copy_(kept[path])
    return found


@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_at_inference_the_batch_optimum_acts(family: str) -> None:
    model, cram = learnt(family, tasks=3)
    updates = {}
    for path, module in cram.modules.items():
        parts = [(a.double(), 2.0 * b.double()) for a, b in module.factors(range(3))]
        gram = sum(a.T @ a for a, _ in parts) + RHO * torch.eye(module.in_features, dtype=torch.float64)
        target = sum(b @ a @ a.T @ a for a, b in parts)
        updates[path] = torch.linalg.solve(gram, target, left=False).float()
    found = logits(model, family)
    torch.testing.assert_close(found, folded(model, family, cram, updates), atol=1e-4, rtol=1e-4)
    zero = {path: torch.zeros_like(update) for path, update in updates.items()}
    assert (found - folded(model, family, cram, zero)).abs().max() > 1e-2


@torch.no_grad()
def test_in_training_the_newest_acts_alone() -> None:
    model, cram = learnt("llava")
    cram.method.begin_task("new", 5)
    randomise(cram)
    updates = {}
    for path, module in cram.modules.items():
        ((a, b),) = module.factors([2])
        updates[path] = 2.0 * b @ a
    found = logits(model.train(), "llava")
    torch.testing.assert_close(found, folded(model, "llava", cram, updates), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_forced_expert_acts_alone() -> None:
    model, cram = learnt("llava")
    updates = {}
    for path, module in cram.modules.items():
        ((a, b),) = module.factors([0])
        updates[path] = 2.0 * b @ a
    with cram.forced("task0"):
        found = logits(model, "llava")
    torch.testing.assert_close(found, folded(model, "llava", cram, updates), atol=1e-4, rtol=1e-4)


def test_a_merged_weight_has_the_sum_of_the_ranks_or_the_width() -> None:
    _, cram = learnt("llava", tasks=5)
    for module in cram.modules.values():
        assert module.solo is not None and module.solo.num_experts == 1 and not module.solo.trained
        assert module.solo.ranks == (min(20, module.in_features, module.out_features),)


def test_a_stream_is_learnt_by_inputs(tmp_path: Path) -> None:
    made = runs.learner(tmp_path / "run", "many", merge_by_inputs=True)
    made.run()
    assert isinstance(made.method, ManyMethod) and made.method.inputs is not None
    tokens = {path: total.diagonal().min() for path, total in made.method.inputs.totals.items()}
    assert tokens and all(value > 0 for value in tokens.values())
    resumed = runs.learner(tmp_path / "run", "many", merge_by_inputs=True)
    resumed.run()
    for path, module in made.cram.modules.items():
        pairs = zip(module.solo_factors(), resumed.cram.modules[path].solo_factors(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_a_lora_of_the_projector_is_not_left_out_silently(tmp_path: Path) -> None:
    model, _ = learnt("llava")
    for refused in (
        lambda: export_lora(model, tmp_path / "one", {"task0": 1.0}),
        lambda: merge(model, {"task0": 1.0}),
    ):
        with pytest.raises(ValueError, match=r"got 'many', which has LoRAs in the projector"):
            refused()
    assert not (tmp_path / "one").exists() and model.cram.num_experts == 2
    plain, _ = learnt("qwen2_5_vl")
    export_lora(plain, tmp_path / "one", {"task0": 1.0})


def test_projector_values_are_counted() -> None:
    _, cram = learnt("llava")
    mixed = cram.method.projector
    assert mixed is not None
    sizes = [linear.in_features + linear.out_features for linear in mixed.modules.values()]
    assert cram.method.trained_values() == 2 * 4 * sum(sizes)


def test_a_wrong_state_changes_nothing() -> None:
    _, cram = learnt("llava")
    state = {name: tensor.clone() for name, tensor in cram.method.export_state().tensors.items()}
    with pytest.raises(ValueError, match=r"missing \['projector.prototypes'\]"):
        cram.method.import_state({n: t + 1 for n, t in state.items() if n != "projector.prototypes"}, {})
    with pytest.raises(
        ValueError, match=r"projector.linear_1.a must have shape \[2, 4, 24\], got \[1, 4, 24\]"
    ):
        cram.method.import_state({**state, "projector.linear_1.a": state["projector.linear_1.a"][:1]}, {})
    assert all(
        torch.equal(tensor, state[name]) for name, tensor in cram.method.export_state().tensors.items()
    )
