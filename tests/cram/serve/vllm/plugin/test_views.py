"""Views of a wrapper: layers are told apart, the wrapper's state is shared, and modules are counted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cram.serve.vllm.group import GateGroup
from cram.serve.vllm.plugin.views import check_modules, install_views

LAYERS, SLOT = 2, 4


class Wrapper:
    """The part of vLLM's wrapper that views see."""

    def __init__(self) -> None:
        self._token_lora_indices = torch.zeros(16)
        self.called: list[torch.Tensor] = []

    def add_expand(self, y: Any, x: torch.Tensor, *rest: Any, **options: Any) -> None:
        self.called.append(x.clone())

    def add_lora_linear(self, y: Any, x: torch.Tensor) -> None:
        self.add_expand(y, x)


class FakeLinear:
    """A LoRA linear that only keeps its wrapper."""

    def __init__(self, wrapper: Any) -> None:
        self.set_mapping(wrapper)

    def set_mapping(self, wrapper: Any) -> None:
        self.punica_wrapper = wrapper


def manager() -> Any:
    """A manager with the linears of two layers, a tower's linear and an output head."""
    wrapper, tower = Wrapper(), Wrapper()
    modules = {
        f"model.layers.{layer}.{name}": FakeLinear(wrapper)
        for layer in range(LAYERS)
        for name in ("self_attn.qkv_proj", "mlp.down_proj")
    }
    modules |= {"tower.layers.9.fc": FakeLinear(tower), "lm_head": FakeLinear(wrapper)}
    made = SimpleNamespace(
        punica_wrapper_mapping={"language": wrapper, "tower": tower},
        modules=modules,
        max_num_seqs=2,
        lora_config=SimpleNamespace(max_lora_rank=SLOT),
        device="cpu",
        packed_modules_mapping={"qkv_proj": ["q_proj", "k_proj", "v_proj"]},
    )
    install_views(made)
    return made


PATHS = tuple(
    f"model.layers.{layer}.{name}"
    for layer in range(LAYERS)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")
)
GROUP = GateGroup(1, ("a",), (2,), LAYERS, PATHS, "content", {"bytes": 1, "sha256": ""})


@pytest.mark.parametrize("compiling", [False, True])
def test_a_step_without_adapters_computes_nothing_but_in_a_graph(
    compiling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = manager()
    wrapper = made.punica_wrapper_mapping["language"]
    view = made.modules["model.layers.0.mlp.down_proj"].punica_wrapper
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    made.cram_table.remember("r", None)
    for adapter, calls in ((0, int(compiling)), (1, 1)):
        made.cram_table.prepare(["r"], np.array([1]), [adapter])
        wrapper.called.clear()
        view.add_lora_linear(None, torch.ones(1, 1, SLOT))
        assert len(wrapper.called) == calls
    # A plain adapter's gates are 1: they are multiplied where a graph may serve other steps.
    made.cram_table.table.fill_(7.0)
    view.add_expand(None, torch.ones(1, 1, SLOT))
    assert wrapper.called[-1].max() == (7.0 if compiling else 1.0)


def test_each_layer_multiplies_by_its_own_gates_and_shares_the_state_of_the_wrapper() -> None:
    made = manager()
    gates = np.array([[2.0], [3.0]], np.float32)
    made.cram_table.remember("r", (GROUP, gates))
    made.cram_table.prepare(["r"], np.array([1]), [1])
    wrapper = made.punica_wrapper_mapping["language"]
    for layer in range(LAYERS):
        view = made.modules[f"model.layers.{layer}.mlp.down_proj"].punica_wrapper
        view.add_expand(None, torch.ones(1, 1, SLOT), (), (), add_inputs=True)
        assert wrapper.called[-1].tolist() == [[[2.0 + layer, 2.0 + layer, 0.0, 0.0]]]
    wrapper.no_lora = "written later"
    assert view.no_lora == "written later"
    with pytest.raises(NotImplementedError, match="embeddings cannot be gated"):
        view.add_lora_embedding()
    with pytest.raises(NotImplementedError, match="output head cannot be gated"):
        view.add_lora_logits()


def test_the_tower_and_the_head_keep_their_wrappers() -> None:
    made = manager()
    assert type(made.modules["tower.layers.9.fc"].punica_wrapper) is Wrapper
    assert type(made.modules["lm_head"].punica_wrapper) is Wrapper
    assert made.cram_table.layers == LAYERS


@pytest.mark.parametrize(
    "loaded",
    [
        set(),
        set(PATHS) - {PATHS[0]},
        (set(PATHS) - {PATHS[0]}) | {"model.layers.7.mlp.down_proj"},
        (set(PATHS) - {PATHS[0]}) | {"lm_head"},
    ],
)
def test_a_module_without_effect_is_refused(loaded: set[str]) -> None:
    check_modules(manager(), set(PATHS), GROUP)
    with pytest.raises(ValueError, match="must gate all 8 modules of the group, got"):
        check_modules(manager(), loaded, GROUP)


def test_another_number_of_layers_is_refused() -> None:
    group = GateGroup(**{**vars(GROUP), "layers": 3})
    with pytest.raises(ValueError, match="must have the model's 2 layers, got 3"):
        check_modules(manager(), set(PATHS), group)
