"""Gates that modules make, merged experts, and what a cache remembers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cram.model.stack
from cram.model.attached import AttachedModel
from cram.model.cache import made_cache
from cram.model.gating import LayerGating, token_means
from cram.model.state import ForwardState
from cram_kernels import expert_lora, pack_experts
from tests.cram.factories import QUESTIONS, continuing, expert_weights, image, prompt, routed_llava


class MeanGating(LayerGating):
    """Gates [S', E] from the mean over a sample's real tokens, times the route's."""

    def __init__(self, name: str, in_features: int, experts: int) -> None:
        super().__init__()
        self.name = name
        self.weight = nn.Parameter(torch.randn(experts, in_features) * 2)

    def forward(self, x: Tensor, route: Tensor, state: ForwardState) -> Tensor:
        def make() -> Tensor:
            kept = torch.ones(x.shape[:2]) if state.mask is None else state.mask.float()
            means = (x.float() * kept[..., None]).sum(1) / kept.sum(1, keepdim=True)
            return (means @ self.weight.T).softmax(-1)

        gates = state.once(f"{self.name}.mean", make)
        return gates * route.repeat_interleave(len(gates) // len(route), 0)


def gated(trained: bool = False) -> tuple[Any, Any, AttachedModel]:
    torch.manual_seed(1)
    model, processor, cram = routed_llava(trained=trained)
    for path, module in cram.modules.items():
        module.gating = MeanGating(path, module.in_features, 3)
    return model, processor, cram


def batch_of(processor: Any, rows: list[int]) -> Any:
    texts = [prompt(QUESTIONS[i % 3], 1) for i in rows]
    return processor(text=texts, images=[image(i) for i in rows], padding=True, return_tensors="pt")


def logits(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits[:, -1]


def test_padding_does_not_reach_the_gates() -> None:
    model, processor, cram = gated()
    together = logits(model, **batch_of(processor, [0, 1, 2]))
    assert not cram.state.mask.all()
    for row in range(3):
        alone = logits(model, **batch_of(processor, [row]))[0]
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}])
def test_decoding_uses_the_gates_of_the_prefill(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor, cram = gated()
    module = next(iter(cram.modules.values()))
    seen: list[Tensor] = []
    forward = module.gating.forward

    def spy(*arguments: Any) -> Tensor:
        seen.append(forward(*arguments).detach())
        return seen[-1]

    monkeypatch.setattr(module.gating, "forward", spy)
    model.generate(
        **batch_of(processor, [0, 1]), max_new_tokens=4, min_new_tokens=4, do_sample=False, **settings
    )
    assert len(seen) == 4
    assert all(torch.equal(gates, seen[0]) for gates in seen[1:])


def test_every_cache_has_its_own_memory_also_under_one_fixed_route() -> None:
    model, processor, cram = gated()
    route = cram.route(cram.encode(QUESTIONS[:1], [[image(0)]]))
    token = torch.tensor([[40]])
    with cram.fixed(route), torch.no_grad():
        caches = [made_cache(model(**batch_of(processor, [row]), use_cache=True)) for row in (0, 1)]
        again = copy.deepcopy(caches[0])
        first = logits(model, input_ids=token, **continuing(model, caches[0]))
        with pytest.raises(ValueError, match=r"q_proj\.mean must come from the prefill of the cache"):
            model(input_ids=token, **continuing(model, again))
        caches[1:] = [made_cache(model(**batch_of(processor, [row]), use_cache=True)) for row in (0, 1)]
        assert torch.equal(logits(model, input_ids=token, **continuing(model, caches[1])), first)
    assert route.memory == {}


def test_gradients_reach_the_gating_and_half_models_keep_it_in_float32() -> None:
    model, processor, cram = gated(trained=True)
    batch = batch_of(processor, [0, 1])
    model.train()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    weights = [module.gating.weight for module in cram.modules.values()]
    assert all(bool(weight.grad.any()) for weight in weights)
    assert {id(weight) for weight in weights} <= {id(p) for p in cram.trainable_parameters()}
    model.half()
    assert all(weight.dtype == torch.float32 for weight in weights)


def test_final_gates_leave_the_gating_out() -> None:
    model, processor, cram = gated()
    batch = batch_of(processor, [0, 1])
    with cram.forced(1):
        forced = logits(model, **batch)
    own = logits(model, **batch)
    assert not torch.allclose(own, forced)
    for module in cram.modules.values():
        module.gating = None
    with cram.forced(1):
        torch.testing.assert_close(logits(model, **batch), forced, atol=1e-5, rtol=1e-5)


def test_only_gates_in_common_go_through_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor, cram_ = gated()
    sizes: list[int] = []
    compute = cram.model.stack.stacked_expert_lora
    monkeypatch.setattr(cram.model.stack, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(
        cram.model.stack,
        "stacked_expert_lora",
        lambda x, layers, gates: sizes.append(len(layers)) or compute(x, layers, gates),
    )
    batch = batch_of(processor, [0])
    logits(model, **batch)
    assert not sizes
    with cram_.forced(0):
        logits(model, **batch)
    assert sizes
    sizes.clear()
    next(m for path, m in cram_.modules.items() if path.endswith("k_proj")).solo = merged(cram_)
    for module in cram_.modules.values():
        module.gating = None
    logits(model, **batch)
    assert len(sizes) == cram_.num_layers - 1


def merged(cram: AttachedModel) -> Any:
    """A merged expert of the first layer's k_proj."""
    path = next(path for path in cram.modules if path.endswith("k_proj"))
    a, b = expert_weights(cram, 9)[path]
    return pack_experts([a], [b], 2.0)


def test_merged_experts_act_alone_outside_of_training() -> None:
    _, _, cram = routed_llava()
    module = next(m for path, m in cram.modules.items() if path.endswith("k_proj"))
    module.solo = merged(cram)
    x = torch.randn(2, 3, module.in_features)
    expected = expert_lora(x, module.weight, module.bias, module.solo, torch.ones(1, 1))
    assert torch.equal(module.eval()(x), expected)
    with cram.forced(0) as route:
        module.current.state = ForwardState(route)
        alone = expert_lora(x, module.weight, module.bias, module.experts, route.gates[module.layer])
        assert torch.equal(module(x), alone) and torch.equal(module.train()(x), alone)
    assert not torch.allclose(alone, expected)


def test_a_pool_replaces_all_experts() -> None:
    model, processor, cram = routed_llava()
    pool = [expert_weights(cram, seed) for seed in (4, 5, 6)]
    cram.set_experts(["a", "b", "c"], pool, trained=2)
    assert cram.in_training and cram.expert_names == ["a", "b", "c"]
    with pytest.raises(ValueError, match="'c' must be frozen before adding one"):
        cram.add_expert("d", pool[0])
    batch = batch_of(processor, [0, 1])
    with cram.fixed(torch.ones(3)):
        model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    for path, module in cram.modules.items():
        assert module.experts.trained_rank == sum(len(weights[path][0]) for weights in pool[1:])
        assert bool(module.experts.trained_a.grad.any())
        torch.testing.assert_close(cram.expert_weights(1)[path], pool[1][path])
    cram.method.freeze()
    assert not cram.trainable_parameters()
    cram.add_expert("d", pool[0])
    with pytest.raises(ValueError, match="every expert must have a group and a centroid"):
        logits(model, **batch)
    cram.freeze()
    cram.set_experts([], [], 0)
    assert cram.num_experts == 0
    with cram.disabled():
        base = logits(model.eval(), **batch)
    assert torch.equal(logits(model, **batch), base)


def test_one_down_projection_for_all_is_kept_once() -> None:
    _, _, cram = routed_llava()
    first, second = expert_weights(cram, 4), expert_weights(cram, 4)
    pool = [first, {path: (first[path][0], 2 * b) for path, (_, b) in second.items()}]
    cram.set_experts(["a", "b"], pool, trained=0)
    for path, module in cram.modules.items():
        assert module.experts.a.shape == first[path][0].shape
        torch.testing.assert_close(cram.expert_weights(1)[path], pool[1][path])
    cram.set_experts(["a", "b"], [cram.expert_weights(index) for index in range(2)], trained=2)
    assert all(m.experts.a.shape == first[path][0].shape for path, m in cram.modules.items())


@pytest.mark.parametrize(
    ("names", "trained"), [(["a"], 0), (["a", "a"], 0), (["a", "b"], 3), (["a", "b"], -1)]
)
def test_a_wrong_pool_changes_nothing(names: list[str], trained: int) -> None:
    _, _, cram = routed_llava()
    pool = [expert_weights(cram, seed) for seed in (4, 5)]
    with pytest.raises(ValueError, match="names must be distinct, one for each of 2 experts"):
        cram.set_experts(names, pool, trained)
    pool[1].popitem()
    with pytest.raises(ValueError, match="weights must name the adapted modules"):
        cram.set_experts(["a", "b"], pool, 0)
    assert cram.expert_names == ["old", "other", "new"]


def test_means_are_over_the_real_tokens_in_float32() -> None:
    x = torch.tensor(
        [[[1.0, 2.0], [3.0, 6.0], [5.0, 10.0]], [[7.0, 8.0], [torch.nan, 0.0], [0.0, torch.inf]]]
    )
    assert torch.equal(token_means(x[:1].half(), None), torch.tensor([[3.0, 6.0]]))
    mask = torch.tensor([[1, 0, 1], [1, 0, 0]], dtype=torch.bool)
    assert torch.equal(token_means(x, mask), torch.tensor([[3.0, 6.0], [7.0, 8.0]]))
    assert torch.equal(token_means(x, torch.zeros_like(mask)), torch.zeros(2, 2))
    assert token_means(x.double(), mask).dtype == torch.float64
