"""Adding, training and freezing experts; the warm-up buffer; precisions."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from cram.attach import attach
from cram.config import CramConfig
from cram.model import linear
from cram.model.attached import AttachedModel
from cram.model.state import ForwardState
from cram.routing.query import Route
from cram_kernels import expert_lora
from tests.cram import factories
from tests.cram.factories import QUESTIONS, image, prompt, routed_llava


def batch_of(processor: Any, dtype: torch.dtype = torch.float32) -> Any:
    texts = [prompt(QUESTIONS[i], 1) for i in range(2)]
    batch = processor(text=texts, images=[image(0), image(1)], padding=True, return_tensors="pt")
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    return batch


def test_buffer_starts_as_the_base_model_and_acts_alone() -> None:
    model, processor, cram = routed_llava()
    batch = batch_of(processor)
    with cram.disabled():
        base = model(**batch).logits
    cram.method.warm_up.begin()
    torch.testing.assert_close(model(**batch).logits, base, atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        for module in cram.modules.values():
            module.trainable()[1].normal_()
    assert (model(**batch).logits - base).abs().max() > 0.1
    with cram.disabled():
        assert torch.equal(model(**batch).logits, base)


def test_buffer_equals_a_lora_with_gate_one() -> None:
    model, processor, cram = routed_llava()
    cram.method.warm_up.begin()
    path, module = next(iter(cram.modules.items()))
    a, b = cram.method.warm_up.factors()[path]
    with torch.no_grad():
        b.normal_()
    x = torch.randn(2, 5, module.in_features)
    torch.testing.assert_close(module(x), module.base(x) + 2 * x @ a.T @ b.T)


def test_buffer_rank_and_initial_values() -> None:
    _, _, cram = routed_llava(buffer_rank=12)
    torch.manual_seed(0)
    cram.method.warm_up.begin()
    for path, (a, b) in cram.method.warm_up.factors().items():
        linear = cram.modules[path]
        assert a.shape == (min(12, linear.in_features, linear.out_features), linear.in_features)
        assert b.shape == (linear.out_features, a.shape[0])
        # Uniform with bound sqrt(6 / (1 + 5) / D_in), the range that nn.Linear and PEFT start with.
        bound = linear.in_features**-0.5
        assert not b.any() and 0.8 * bound < a.abs().max() <= bound
    assert a.dtype == torch.float32
    _, _, cram = routed_llava(buffer_rank=48)
    cram.method.warm_up.begin()
    assert {a.shape[0] for a, _ in cram.method.warm_up.factors().values()} == {32, 16}


def test_only_the_buffer_is_trained_during_the_warm_up() -> None:
    model, processor, cram = routed_llava()
    cram.method.warm_up.begin()
    batch = batch_of(processor)
    parameters = cram.trainable_parameters()
    assert len(parameters) == 2 * len(cram.modules)
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters() if p.requires_grad}
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    b_gradients = [p.grad for p in parameters[1::2]]
    assert all(gradient.abs().max() > 0 for gradient in b_gradients)
    cram.method.warm_up.end()
    assert not cram.trainable_parameters() and not [p for p in model.parameters() if p.requires_grad]


def test_only_the_new_expert_is_trained_after_it() -> None:
    model, processor, cram = routed_llava(trained=True)
    parameters = cram.trainable_parameters()
    assert len(parameters) == 2 * len(cram.modules) + 1
    assert parameters[-1] is cram.method.router.trained_centroid
    before = {path: [t.clone() for t in m.experts.expert(0)] for path, m in cram.modules.items()}
    batch = batch_of(processor)
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    first = model.train()(**batch, labels=batch["input_ids"]).loss
    first.backward()
    assert all(p.grad.abs().max() > 0 for p in parameters)
    optimizer.step()
    assert model(**batch, labels=batch["input_ids"]).loss < first
    for path, module in cram.modules.items():
        assert all(torch.equal(x, y) for x, y in zip(module.experts.expert(0), before[path], strict=True))
    trained = model.eval()(**batch).logits
    cram.method.freeze()
    assert not cram.trainable_parameters() and not cram.in_training
    assert torch.equal(model(**batch).logits, trained)


def test_life_of_a_task() -> None:
    _, _, cram = routed_llava()
    history = cram.method.history(0)
    assert [a.shape[0] for a in history["model.language_model.layers.0.self_attn.q_proj"]] == [1, 3]
    assert all(len(a) == 1 for a in cram.method.history(1).values())
    assert not any(cram.method.history(5).values())
    with pytest.raises(ValueError, match="asked for during the warm-up"):
        cram.method.warm_up.factors()
    cram.method.warm_up.begin()
    with pytest.raises(ValueError, match="must begin after the last one has ended"):
        cram.method.warm_up.begin()
    with pytest.raises(ValueError, match="must be trained beyond its warm-up"):
        cram.method.freeze()
    new = factories.expert_weights(cram, 9)
    with pytest.raises(ValueError, match="the warm-up must end before an expert is added"):
        cram.method.add_expert("late", new, 0, torch.zeros(factories.PROJECTION))
    cram.method.warm_up.end()
    cram.method.add_expert("late", new, 0, torch.zeros(factories.PROJECTION))
    with pytest.raises(ValueError, match="must begin after the last one has ended"):
        cram.method.warm_up.begin()
    with pytest.raises(ValueError, match="must be frozen before"):
        cram.method.add_expert("later", new, 0, torch.zeros(factories.PROJECTION))
    cram.method.freeze()
    with pytest.raises(ValueError, match="got no trained expert"):
        cram.method.freeze()


def wrong_weights(cram: AttachedModel, change: str) -> dict[str, Any]:
    weights: dict[str, Any] = dict(factories.expert_weights(cram, 3))
    path = next(iter(weights))
    a, b = weights[path]
    changed = {
        "missing": None,
        "width": (a[:, 1:], b),
        "rank": (a, torch.zeros(b.shape[0], a.shape[0] + 1)),
        "vector": (a[0], b),
        "integer": (a.long(), b),
        "nan": (a, b * torch.nan),
    }[change]
    weights[path] = changed
    if changed is None:
        weights["model.elsewhere"] = weights.pop(path)
    return weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"missing \['model.language_model.layers.0.self_attn.q_proj'\], unknown"),
        ("width", r"must be float \[r, 32\] and \[32, r\]"),
        ("rank", r"must be float \[r, 32\] and \[32, r\]"),
        ("vector", r"must be float \[r, 32\] and \[32, r\]"),
        ("integer", "got torch.int64"),
        ("nan", "must be finite, got NaN or Inf"),
    ],
)
def test_wrong_weights_change_nothing(change: str, message: str) -> None:
    _, _, cram = routed_llava()
    with pytest.raises(ValueError, match=message):
        cram.method.add_expert("bad", wrong_weights(cram, change), 0, torch.zeros(factories.PROJECTION))
    assert cram.num_experts == 3
    assert {module.experts.num_experts for module in cram.modules.values()} == {3}


@pytest.mark.parametrize("centroid", [torch.zeros(5), torch.full((factories.PROJECTION,), torch.inf)])
def test_wrong_centroids_change_nothing(centroid: torch.Tensor) -> None:
    _, _, cram = routed_llava()
    with pytest.raises(ValueError, match="centroid must"):
        cram.method.add_expert("bad", factories.expert_weights(cram, 3), 0, centroid)
    assert {module.experts.num_experts for module in cram.modules.values()} == {3}


def test_experts_of_rank_zero_are_legal() -> None:
    model, processor, cram = routed_llava()
    nothing = {
        p: (torch.zeros(0, m.in_features), torch.zeros(m.out_features, 0)) for p, m in cram.modules.items()
    }
    cram.method.add_expert("nothing", nothing, 0, torch.zeros(factories.PROJECTION), trained=False)
    batch = batch_of(processor)
    with cram.disabled():
        base = model(**batch).logits
    with cram.forced("nothing"):
        torch.testing.assert_close(model(**batch).logits, base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_with_float32_experts(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact_model, processor, exact = routed_llava()
    clip = factories.clip_model()
    model = factories.llava(clip=clip).to(dtype)
    cram = attach(model, exact.config, factories.clip_encoder(model, clip), processor)
    cram.method.router.groups.import_state(*exact.method.router.groups.export_state())
    for index, (name, group) in enumerate(zip(["old", "other", "new"], [0, 1, 0], strict=True)):
        centroid = exact.method.router.centroids()[:, index]
        cram.method.add_expert(
            name, factories.expert_weights(cram, index), group, centroid, trained=index == 2
        )
    batch = batch_of(processor, dtype)
    logits = model(**batch).logits
    assert logits.dtype == dtype
    expected = exact_model(**batch_of(processor)).logits
    with monkeypatch.context() as patched:
        patched.setattr(linear, "expert_lora", partial(expert_lora, impl="reference"))
        plain = model(**batch).logits
    error, budget = ((found - expected).double().square().mean().sqrt() for found in (logits, plain))
    assert 0 < error <= 2 * budget
    assert cram.state.route.gates.dtype == torch.float32
    cram.method.prepare_penalty()
    loss = model.train()(**batch, labels=batch["input_ids"]).loss + cram.method.penalty(cram.state)
    loss.backward()
    for parameter in cram.trainable_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().max() > 0


def test_an_expert_without_a_route_is_an_error() -> None:
    _, _, cram = routed_llava()
    module = next(iter(cram.modules.values()))
    with pytest.raises(ValueError, match="q_proj must be routed before it runs"):
        module(torch.zeros(1, 2, module.in_features))


def test_adapted_linear_looks_like_its_base() -> None:
    model = factories.qwen2_5_vl()
    cram = attach(model, CramConfig(), factories.clip_encoder())
    for module in cram.modules.values():
        base = module.base
        assert isinstance(base, nn.Linear) and module.weight is base.weight and module.bias is base.bias
        assert (module.in_features, module.out_features) == (base.in_features, base.out_features)


@pytest.mark.parametrize(
    ("training", "overrides", "acts"),
    [(False, False, True), (True, False, False), (False, True, False), (True, True, False)],
)
def test_a_solo_expert_that_has_learnt_acts_outside_of_training_alone(
    training: bool, overrides: bool, acts: bool
) -> None:
    """And where the route does not say which experts act. While it is trained it acts in any case."""
    _, _, cram = routed_llava()
    module = next(iter(cram.modules.values())).train(training)
    module.current.state = ForwardState(Route(torch.ones(2, 1, 3), overrides_gating=overrides))
    pair = torch.ones(2, module.in_features), torch.ones(module.out_features, 2)
    module.set_solo(pair, 1.0, trained=False)
    assert module.acting(module.current.state) is (module.solo if acts else module.experts)
    module.set_solo(pair, 1.0, trained=True)
    assert module.acting(module.current.state) is module.solo


def test_experts_of_rank_zero_share_nothing() -> None:
    """Their factors have no memory, so all have one address."""
    _, _, cram = routed_llava()
    module = next(iter(cram.modules.values()))
    empty = [(torch.zeros(0, module.in_features), torch.zeros(module.out_features, 0)) for _ in range(2)]
    module.set_experts(empty, 1.0, 0)
    assert module.experts is not None and not module.experts.shared_a and module.experts.ranks == (0, 0)
    one = torch.ones(2, module.in_features)
    module.set_experts([(one, torch.ones(module.out_features, 2)) for _ in range(2)], 1.0, 0)
    assert module.experts.shared_a


def test_a_gate_that_inference_mode_made_serves_no_training() -> None:
    """A backward cannot save it."""
    _, _, cram = routed_llava()
    module = next(iter(cram.modules.values()))
    module.set_solo(
        (torch.ones(2, module.in_features), torch.ones(module.out_features, 2)), 1.0, trained=True
    )
    x = torch.ones(1, 3, module.in_features)
    with torch.inference_mode():
        expected = module(x).clone()
    y = module(x.requires_grad_())
    y.sum().backward()
    assert torch.equal(y, expected) and x.grad is not None and x.grad.any()
