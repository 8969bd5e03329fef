"""Expert folders in PEFT's own tools: weighted adapters, and one adapter in the place of another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter

import cram
from tests.cram import factories

GATES = {"a": 0.25, "b": 0.5, "c": 0.25}
Weights = Callable[[Any, int], Any]


def even(handle: Any, seed: int) -> Any:
    """Factors of rank 3 in every linear."""
    torch.manual_seed(seed)
    return {
        path: (torch.randn(3, linear.in_features) * 0.3, torch.randn(linear.out_features, 3) * 0.3)
        for path, linear in handle.modules.items()
    }


def saved(folder: Path, weights: Weights) -> Any:
    """A bundle of three experts; returns the handle of the model that holds them."""
    model = factories.llava()
    handle = cram.attach(model, cram.CramConfig(dropout=0.0), factories.clip_encoder())
    query = handle.encode(["What?"], [[factories.image(0)]])
    handle.method.router.groups.observe("a", query.text)
    for seed, name in enumerate(GATES):
        handle.method.add_expert(name, weights(handle, seed), 0, query.image[0] + seed, trained=False)
    cram.save(model, folder / "bundle")
    return handle


def base_with(folder: Path, expert: str) -> Any:
    return PeftModel.from_pretrained(factories.llava(), folder / "bundle/experts" / expert, expert).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(**factories.inputs("llava")).logits
    return found


def test_a_weighted_adapter_by_concatenation_is_a_route_with_fixed_gates(tmp_path: Path) -> None:
    handle = saved(tmp_path, factories.expert_weights)
    model = base_with(tmp_path, "a")
    for name in ("b", "c"):
        model.load_adapter(tmp_path / "bundle/experts" / name, name)
    model.add_weighted_adapter(list(GATES), list(GATES.values()), "mixture", combination_type="cat")
    model.set_adapter("mixture")
    with handle.fixed(torch.tensor(list(GATES.values()))):
        expected = logits(handle._model)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    model.set_adapter("b")
    assert not torch.allclose(logits(model), expected)


def test_one_expert_takes_anothers_place_where_ranks_are_equal(tmp_path: Path) -> None:
    handle = saved(tmp_path, even)
    model = base_with(tmp_path, "a")
    hotswap_adapter(model, str(tmp_path / "bundle/experts/b"), adapter_name="a")
    with handle.forced("b"):
        torch.testing.assert_close(logits(model), logits(handle._model), atol=1e-5, rtol=1e-5)


def test_peft_refuses_to_swap_experts_of_other_ranks(tmp_path: Path) -> None:
    saved(tmp_path, factories.expert_weights)
    with pytest.raises(ValueError, match="Configs are incompatible: for alpha_pattern"):
        hotswap_adapter(base_with(tmp_path, "a"), str(tmp_path / "bundle/experts/b"), adapter_name="a")
