"""Linears without experts that compute few rows natively."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cram.serve.engine import few_rows
from cram.serve.engine.engine import Engine
from cram_kernels import available_impls
from tests.cram.factories import routed_llava

MISSING = available_impls()["expert_lora"]["native"]


@pytest.mark.skipif(MISSING is not None, reason=f"the native layer is missing: {MISSING}")
@pytest.mark.parametrize("rows", [1, 3, 8, 9])
def test_few_rows_are_computed_natively_and_alike(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, cram = routed_llava()
    calls: list[Any] = []
    original = few_rows.expert_lora
    monkeypatch.setattr(few_rows, "expert_lora", lambda *args: calls.append(args) or original(*args))
    linears = [model.lm_head, model.model.language_model.layers[0].mlp.down_proj]
    for linear in linears:
        x = torch.randn(rows, 1, linear.in_features)
        expected = linear(x)
        take_back = few_rows.use_native_products(model)
        with torch.no_grad():
            torch.testing.assert_close(linear(x), expected, atol=1e-5, rtol=1e-5)
        take_back()
        assert "forward" not in linear.__dict__
    assert len(calls) == (2 if rows in (3, 8) else 0)


@pytest.mark.skipif(MISSING is not None, reason=f"the native layer is missing: {MISSING}")
def test_an_engine_gives_the_linears_back() -> None:
    model, processor, cram = routed_llava()
    engine = Engine(model, processor)
    changed = {name for name, module in model.named_modules() if "forward" in module.__dict__}
    assert "lm_head" in changed and not any("vision" in name or "self_attn" in name for name in changed)
    engine.start()
    assert engine.stop(10)
    assert not any("forward" in module.__dict__ for module in model.modules())
