"""The mixture of projectors: its golden vectors, and its place in whole models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cram import attach, detach
from cram.methods.parts.projector import MixedProjector, mixing_weights
from cram.model.attached import AttachedModel
from cram.model.linear import ExpertLinear
from tests.cram import factories, runs
from tests.cram.golden_cases import assert_complete, golden_names, load

FAMILIES = ("llava", "internvl")


@pytest.mark.parametrize("name", golden_names("many_cpm_weights"))
def test_golden(name: str) -> None:
    case, tensors = load("many_cpm_weights", name)
    temperature, query = case["config"]["temperature"], tensors["in.query"]
    weights = mixing_weights(query, tensors["in.prototypes"], temperature)
    torch.testing.assert_close(weights, tensors["out.weights"], rtol=1e-9, atol=1e-10)
    # Projectors without a base, P_t = I A_t, on images of one token: the mixture itself, in float32.
    projector = nn.Sequential(nn.Linear(query.shape[1], tensors["param.projectors"].shape[1], bias=False))
    projector.requires_grad_(False)[0].weight.zero_()
    settings = SimpleNamespace(scale=1.0, dropout=0.0)
    encoder = SimpleNamespace(reuses_vision_tower=False, image_dim=3)
    hooks = SimpleNamespace(override=None)
    state_of = {"is_disabled": False, "in_training": False, "device": torch.device("cpu"), "hooks": hooks}
    cram: Any = SimpleNamespace(config=settings, encoder=encoder, **state_of)
    mixed = MixedProjector(cram, projector, nn.Identity(), temperature)
    state = {"prototypes": tensors["in.prototypes"].float(), "0.a": tensors["param.projectors"].float()}
    state["0.b"] = torch.eye(state["0.a"].shape[1]).expand(len(state["0.a"]), -1, -1)
    mixed.load_state(state)
    found = projector(query.float()[:, None])[:, 0]
    torch.testing.assert_close(found, tensors["out.mixed_projection"].float(), atol=2e-5, rtol=1e-4)


def test_all_golden_cases_are_used() -> None:
    assert_complete("many_cpm_weights", {"a"})


def prepared(family: str, tasks: int = 2) -> tuple[Any, AttachedModel, MixedProjector]:
    """A model of a family after tasks with random LoRAs and prototypes."""
    clip = factories.clip_model()
    model = factories.llava(clip=clip) if family == "llava" else factories.MODELS[family]()
    cram = attach(model, runs.config(method="many", dropout=0.0), factories.clip_encoder(model, clip))
    for task in range(tasks):
        cram.add_expert(f"task{task}", factories.expert_weights(cram, task), trained=False)
    mixed = cram.method.projector
    assert mixed is not None
    mixed.load_state({name: 0.3 * torch.randn(shape) for name, shape in mixed.shapes(tasks, 4).items()})
    return model, cram, mixed


def embeddings(model: Any, family: str, images: int = 3) -> Tensor:
    """Embeddings [N, T, H] of some random images."""
    pixels = factories.inputs(family, rows=images)["pixel_values"]
    with torch.no_grad():
        found = model.model.get_image_features(
            pixel_values=pixels,
            vision_feature_layer=model.config.vision_feature_layer,
            vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        )
    return torch.stack(list(found.pooler_output))


def alone(mixed: MixedProjector, model: Any, family: str, index: int) -> Tensor:
    """Embeddings under one task's projector, by weights folded into the linears' base."""
    kept = {path: linear.base.weight.clone() for path, linear in mixed.modules.items()}
    with torch.no_grad():
        for linear in mixed.modules.values():
            ((a, b),) = linear.factors([index])
            linear.base.weight += 2.0 * b @ a
        with model.cram.disabled():
            found = embeddings(model, family)
        for path, linear in mixed.modules.items():
            linear.base.weight.copy_(kept[path])
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_mixed_image_by_image(family: str) -> None:
    model, cram, mixed = prepared(family, tasks=3)
    seen: list[Tensor] = []
    handle = model.model.multi_modal_projector.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].mean(1))
    )
    found = embeddings(model, family)
    handle.remove()
    features = seen[0]
    if family == "llava":
        pixels = factories.inputs(family, rows=3)["pixel_values"]
        features = cram.encoder.encode_pixels(pixels)
    weights = torch.softmax(
        torch.cosine_similarity(features[:, None], mixed.prototypes[None], dim=-1) / 0.1, 1
    )
    assert (weights[0] - weights[1]).abs().max() > 1e-3
    parts = [alone(mixed, model, family, index) for index in range(3)]
    wanted = sum(weights[:, index, None, None] * part for index, part in enumerate(parts))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert (found - parts[0]).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_fixed_gates_mix_the_projectors_too(family: str) -> None:
    model, cram, mixed = prepared(family, tasks=3)
    parts = [alone(mixed, model, family, index) for index in range(3)]
    with cram.disabled():
        base = embeddings(model, family)
    with cram.forced("task1"):
        torch.testing.assert_close(embeddings(model, family), parts[1], atol=1e-5, rtol=1e-5)
    with cram.fixed(torch.tensor([0.5, 0.0, 0.25])):
        wanted = 0.5 * parts[0] + 0.25 * parts[2] + 0.25 * base
        torch.testing.assert_close(embeddings(model, family), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_disabled_is_the_base_and_detach_gives_it_back(family: str) -> None:
    clip = factories.clip_model()
    plain = factories.llava(clip=clip) if family == "llava" else factories.MODELS[family]()
    base = embeddings(plain, family)
    model, cram, _ = prepared(family)
    with cram.disabled():
        assert torch.equal(embeddings(model, family), base)
    assert not torch.equal(embeddings(model, family), base)
    detach(model)
    assert torch.equal(embeddings(model, family), base)
    assert not any(isinstance(module, ExpertLinear) for module in model.modules())
    projector = model.model.multi_modal_projector
    assert not projector._forward_hooks and not projector._forward_pre_hooks
    assert len(model.model.vision_tower._forward_hooks) == len(plain.model.vision_tower._forward_hooks)


def test_without_a_task_the_projector_is_the_base() -> None:
    plain = embeddings(factories.llava(clip=factories.clip_model()), "llava")
    model, _, mixed = prepared("llava", tasks=0)
    assert torch.equal(embeddings(model, "llava"), plain)
    assert mixed.state().keys() == mixed.shapes(0, 3).keys() == {"prototypes"}


@pytest.mark.parametrize("family", FAMILIES)
def test_in_training_the_newest_acts_alone_and_its_prototype_is_the_mean(family: str) -> None:
    model, cram, mixed = prepared(family)
    cram.method.begin_task("task2", 5)
    for parameter in mixed.trainable():
        nn.init.normal_(parameter, std=0.3)
    model.train()
    found = embeddings(model, family)
    prototypes = mixed.prototypes.clone()
    embeddings(model, family, images=1)
    model.eval()
    assert torch.equal(embeddings(model, family), found)
    torch.testing.assert_close(found, alone(mixed, model, family, 2), atol=1e-4, rtol=1e-4)
    cram.method.end_task()
    assert mixed.trainable() == []
    before = mixed.prototypes.clone()
    if family == "llava":
        rows = [cram.encoder.encode_pixels(factories.inputs(family, rows=n)["pixel_values"]) for n in (3, 1)]
        torch.testing.assert_close(before[2], torch.cat(rows).mean(0))
    assert torch.equal(before[:2], prototypes[:2]) and before[2].ne(0).any()
    embeddings(model, family)
    assert torch.equal(mixed.prototypes, before)


def test_gradients_reach_the_newest_alone() -> None:
    model, cram, mixed = prepared("llava")
    cram.method.begin_task("task2", 5)
    parameters = mixed.trainable()
    nn.init.normal_(parameters[1])
    model.train()
    model(**factories.inputs("llava"), use_cache=False).logits.sum().backward()
    assert parameters[0].grad is not None and parameters[0].grad.abs().max() > 0
    trained = {id(parameter) for parameter in [*parameters, *cram.trainable_parameters()]}
    assert trained == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


def test_families_without_a_separable_projector_have_none() -> None:
    for family in ("qwen2_5_vl", "qwen3_vl"):
        model = factories.MODELS[family]()
        cram = attach(model, runs.config(method="many"), factories.clip_encoder())
        assert (
            cram.projector is None
            and cram.method.projector is None
            and cram.method.export_state() == ({}, {})
        )
