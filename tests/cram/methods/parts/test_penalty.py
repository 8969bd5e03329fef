"""The penalty on an attached model: which modules, which inputs, when, and through what it is
differentiated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cram.bundle.bundle import load, save
from cram.methods.parts import penalty
from cram.methods.parts.penalty import history_columns
from cram.model import state
from cram.model.attached import AttachedModel
from tests.cram.factories import (
    IMAGE_ID,
    PROJECTION,
    QUESTIONS,
    clip_encoder,
    clip_model,
    expert_weights,
    image,
    llava,
    prompt,
    routed_llava,
)


def training_batch(processor: Any) -> Any:
    texts = [
        prompt(QUESTIONS[0], 1, "red"),
        prompt(QUESTIONS[0], 2, "deep blue"),
        prompt(QUESTIONS[0], 0, "no"),
    ]
    return processor(text=texts, images=[image(i) for i in range(3)], padding=True, return_tensors="pt")


def inputs_of(cram: AttachedModel, model: Any, batch: Any) -> dict[str, Tensor]:
    """What every adapted linear is given."""
    seen: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, path=path: seen.update({path: args[0].detach()}))
        for path, module in cram.modules.items()
    ]
    model(**batch)
    for hook in hooks:
        hook.remove()
    return seen


def plain_penalty(
    cram: AttachedModel, inputs: dict[str, Tensor], batch: Any, pairs: dict[str, str]
) -> Tensor:
    """The formula, term by term; `pairs` maps a penalised module to the module whose input it sees."""
    visual = batch["input_ids"] == IMAGE_ID
    terms = []
    for path, source in pairs.items():
        module = cram.modules[path]
        old, new = module.experts.expert(0), module.experts.expert(2)
        released_square = cram.config.released_code and module.in_features == module.out_features
        q, _ = torch.linalg.qr(old[0].mT if released_square else old[1])
        for row, x in enumerate(inputs[source]):
            h = x[visual[row]].mean(0) if visual[row].any() else torch.zeros_like(x[0])
            z = cram.config.scale * new[1] @ (new[0] @ h)
            gamma = cram.method.router.gamma(cram.state.route)[module.layer, row]
            terms.append(gamma * (q.mT @ z).square().sum())
    return torch.stack(terms).mean()


def test_every_module_is_penalised_on_its_own_input() -> None:
    model, processor, cram = routed_llava(trained=True, penalty_weight=0.7)
    cram.method.prepare_penalty()
    batch = training_batch(processor)
    inputs = inputs_of(cram, model.train(), batch)
    value = cram.method.penalty(cram.state)
    expected = 0.7 * plain_penalty(cram, inputs, batch, {path: path for path in cram.modules})
    torch.testing.assert_close(value, expected)
    assert value > 0.01 and torch.equal(cram.method.extra_loss(cram.state), value)
    cram.method.freeze()
    assert cram.method.extra_loss(cram.state) is None


def test_released_code_penalises_one_module_per_layer_on_the_last_input() -> None:
    model, processor, cram = routed_llava(trained=True, released_code=True)
    cram.method.prepare_penalty()
    batch = training_batch(processor)
    cram.method.locked_group = 0
    inputs = inputs_of(cram, model.train(), batch)
    name = "model.language_model.layers.{}.self_attn.{}_proj"
    pairs = {name.format(layer, "q"): name.format(layer, "o") for layer in range(2)}
    torch.testing.assert_close(cram.method.penalty(cram.state), plain_penalty(cram, inputs, batch, pairs))


def test_gradient_reaches_the_new_expert_and_its_centroid_but_not_the_inputs() -> None:
    model, processor, cram = routed_llava(trained=True)
    cram.method.prepare_penalty()
    model.train()(**training_batch(processor))
    modules = list(cram.modules.values())
    assert not any(hidden.requires_grad for hidden in cram.state.hidden.values())
    assert len(cram.state.hidden) == len(modules)
    value = cram.method.penalty(cram.state)
    first, *others = torch.autograd.grad(
        value, [p for m in modules for p in m.trainable()], retain_graph=True
    )
    assert first.abs().max() > 0 and all(gradient.abs().max() > 0 for gradient in others)
    (centroid,) = torch.autograd.grad(value, [cram.method.router.trained_centroid])
    assert centroid.abs().amax(1).min() > 0


def test_dropout_acts_on_the_means() -> None:
    model, processor, cram = routed_llava(trained=True, dropout=0.5)
    cram.method.prepare_penalty()
    model.train()(**training_batch(processor))
    assert not torch.equal(cram.method.penalty(cram.state), cram.method.penalty(cram.state))


def test_penalty_is_zero_without_older_experts_of_the_group() -> None:
    model, processor, cram = routed_llava()
    cram.method.add_expert("alone", expert_weights(cram, 7), 2, torch.zeros(PROJECTION))
    cram.method.prepare_penalty()
    cram.method.locked_group = 2
    model.train()(**training_batch(processor))
    assert cram.method.penalty(cram.state) == 0
    assert not cram.state.hidden


@pytest.mark.parametrize("config", [{}, {"penalty_weight": 0.0}])
def test_inputs_are_pooled_once_for_q_k_and_v_and_only_while_needed(
    config: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor, cram = routed_llava(trained=True, **config)
    pooled: list[Tensor] = []
    mean = state.visual_mean
    monkeypatch.setattr(state, "visual_mean", lambda x, mask: pooled.append(x) or mean(x, mask))
    batch = training_batch(processor)
    model.train()(**batch)
    assert not pooled
    cram.method.prepare_penalty()
    model.eval()(**batch)
    assert not pooled
    model.train()(**batch)
    assert len(pooled) == (0 if config else 2 * 2)
    cram.method.freeze()
    model(**batch)
    assert len(pooled) == (0 if config else 2 * 2)


def bases_of(cram: AttachedModel) -> list[Tensor]:
    assert cram.method._penalty is not None
    return cram.method._penalty._bases


@pytest.mark.parametrize("config", [{}, {"released_code": True}])
def test_a_task_works_on_its_new_expert_alone(
    config: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, cram = routed_llava(trained=True, **config)
    cram.method.prepare_penalty()
    before = bases_of(cram)
    cram.method.freeze()
    cram.method.add_expert("third", expert_weights(cram, 7), 0, torch.zeros(PROJECTION))
    seen: list[tuple[int, int]] = []
    plain = penalty.orthonormal_basis

    def recorded(columns: Tensor, basis: Tensor | None = None) -> Tensor:
        seen.append((columns.shape[1], 0 if basis is None else basis.shape[1]))
        return plain(columns, basis)

    monkeypatch.setattr(penalty, "orthonormal_basis", recorded)
    cram.method.prepare_penalty()
    paths = [path for path in cram.modules if not config or path.endswith("q_proj")]
    ranks = [cram.modules[path].experts.ranks[2] for path in paths]
    assert seen == list(zip(ranks, [basis.shape[1] for basis in before], strict=True))
    for old, basis, path in zip(before, bases_of(cram), paths, strict=True):
        assert torch.equal(basis[:, : old.shape[1]], old)
        factors = cram.modules[path].factors([0, 2])
        columns = history_columns("input" if config else "output", factors)
        whole = plain(columns)
        assert basis.shape == whole.shape
        torch.testing.assert_close(basis @ basis.mT, whole @ whole.mT)
    seen.clear()
    cram.method.prepare_penalty()
    assert not seen


def test_bases_of_another_group_and_of_a_loaded_model_are_made_from_their_experts(tmp_path: Path) -> None:
    model, processor, cram = routed_llava(trained=True)
    cram.method.prepare_penalty()
    cram.method.freeze()
    cram.method.add_expert("aside", expert_weights(cram, 5), 1, torch.zeros(PROJECTION))
    cram.method.prepare_penalty()
    aside = [plain for module in cram.modules.values() for plain in history(module.factors([1]))]
    assert all(torch.equal(*pair) for pair in zip(bases_of(cram), aside, strict=True))
    cram.method.freeze()
    cram.method.add_expert("third", expert_weights(cram, 7), 0, torch.zeros(PROJECTION))
    cram.method.prepare_penalty()
    save(model, tmp_path / "bundle")
    clip = clip_model()
    other = llava(clip=clip)
    loaded = load(other, tmp_path / "bundle", clip_encoder(other, clip), processor)
    loaded.method.add_expert("fourth", expert_weights(loaded, 8), 0, torch.zeros(PROJECTION))
    cram.method.freeze()
    cram.method.add_expert("fourth", expert_weights(cram, 8), 0, torch.zeros(PROJECTION))
    for each in (cram, loaded):
        each.method.prepare_penalty()
    assert all(torch.equal(*pair) for pair in zip(bases_of(cram), bases_of(loaded), strict=True))


def history(factors: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [penalty.orthonormal_basis(history_columns("output", factors))]


def test_order_of_calls_is_checked() -> None:
    model, processor, cram = routed_llava()
    with pytest.raises(ValueError, match="got no expert in training"):
        cram.method.prepare_penalty()
    cram.method.add_expert("late", expert_weights(cram, 7), 0, torch.zeros(PROJECTION))
    with pytest.raises(ValueError, match="penalty must follow prepare_penalty"):
        cram.method.penalty(cram.state)
    cram.method.prepare_penalty()
    model.eval()(**training_batch(processor))
    with pytest.raises(ValueError, match="must follow a forward in training mode"):
        cram.method.penalty(cram.state)
    model.train()
    with cram.fixed(torch.ones(4)):
        model(**training_batch(processor))
        with pytest.raises(ValueError, match="gamma must be of a query's route"):
            cram.method.penalty(cram.state)
    embeds = torch.zeros(1, 3, 32)
    with cram.forced("late"), pytest.raises(ValueError, match="must see input_ids to find the visual tokens"):
        model.train()(inputs_embeds=embeds)
