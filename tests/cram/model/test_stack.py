"""Linears with one input: computed in one call, and never answered with another call's result."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import cram.model.linear
import cram.model.stack
from cram.model.state import ForwardState
from cram_kernels import expert_lora
from tests.cram.factories import QUESTIONS, image, prompt, routed_llava


@pytest.fixture
def stacks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the stacks that were computed."""
    sizes: list[int] = []
    compute = cram.model.stack.stacked_expert_lora

    def counted(x: Any, layers: Any, gates: Any) -> Any:
        sizes.append(len(layers))
        return compute(x, layers, gates)

    monkeypatch.setattr(cram.model.stack, "stacked_expert_lora", counted)
    monkeypatch.setattr(cram.model.stack, "DEVICES", ("cpu", "cuda"))
    return sizes


def attention(attached: Any) -> list[Any]:
    """q, k and v of the first decoder layer."""
    parent = next(path for path in attached.modules if path.endswith("q_proj"))[: -len("q_proj")]
    return [attached.modules[f"{parent}{name}_proj"] for name in "qkv"]


def batch_of(processor: Any) -> Any:
    texts = [prompt(QUESTIONS[i], 1) for i in range(2)]
    return processor(text=texts, images=[image(0), image(1)], padding=True, return_tensors="pt")


def alone(module: Any, x: torch.Tensor) -> torch.Tensor:
    gates = module.current.state.gates[module.layer]
    return expert_lora(x, module.base.weight, module.base.bias, module.experts, gates)


def test_model_computes_shared_inputs_once(stacks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    alone: list[int] = []
    compute = cram.model.linear.expert_lora

    def counted(x: Any, *arguments: Any, **options: Any) -> Any:
        alone.append(x.shape[-1])
        return compute(x, *arguments, **options)

    monkeypatch.setattr(cram.model.linear, "expert_lora", counted)
    projections = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")
    model, processor, attached = routed_llava(target_projections=projections)
    batch = batch_of(processor)
    with torch.no_grad():
        logits = model(**batch).logits
        layers = attached.num_layers
        assert sorted(stacks) == [2] * layers + [3] * layers
        assert len(alone) == layers, "of each layer, o_proj"
        for module in attached.modules.values():
            module.stack = None
        torch.testing.assert_close(model(**batch).logits, logits, rtol=1e-5, atol=1e-6)


def test_a_linear_without_siblings_has_no_stack() -> None:
    _, _, attached = routed_llava(target_projections=("q_proj", "v_proj", "o_proj", "gate_proj"))
    sizes = {
        path: 0 if each.stack is None else len(each.stack.members) for path, each in attached.modules.items()
    }
    assert all(size == 2 * path.endswith(("q_proj", "v_proj")) for path, size in sizes.items())


def test_results_go_only_to_what_they_were_computed_from(stacks: list[int]) -> None:
    model, processor, attached = routed_llava()
    query = attached.encode(QUESTIONS[:1], [[image(0)]])
    q, k, v = attention(attached)
    x, other = torch.randn(3, q.in_features), torch.randn(3, q.in_features)
    first, second = attached.route(query), attached.method.route_within(query, 1)
    q.current.state = ForwardState(first)
    q(x)
    torch.testing.assert_close(k(other), alone(k, other))
    q.current.state = ForwardState(second)
    torch.testing.assert_close(v(x), alone(v, x))
    q.current.state = ForwardState(first)
    with torch.no_grad():
        q(x)
    assert k(x.clone().requires_grad_()).requires_grad
    assert len(stacks) == 2
    with torch.no_grad():
        q(x)
        k.experts = copy.deepcopy(k.experts)
        k.experts.bt.mul_(2)
        torch.testing.assert_close(k(x), alone(k, x))


def test_training_with_dropout_draws_one_mask_a_linear(stacks: list[int]) -> None:
    model, processor, attached = routed_llava(trained=True, dropout=0.1)
    model.train()
    model(**batch_of(processor))
    assert not stacks
    model.eval()
    model(**batch_of(processor))
    assert stacks
