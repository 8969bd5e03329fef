"""Results of a layer whose base product and EXPAND share them in other orders."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cram_kernels import dropout_mask, stacked_expert_lora
from cram_kernels.expert_lora import tiles
from cram_kernels.expert_lora.dropout import keep_scale
from cram_kernels.testing import assert_within_rounding, layer_inputs, poisoned_allocations, run_layer
from tests.cram_kernels.devices import FP16, on_devices, quiet_numpy

pytestmark = quiet_numpy
RANKS = (4, 9, 5, 8)

ORDERS = {"chunks": tiles.Order(chunk=48), "last": tiles.Order(base_last=True), "both": tiles.Order(48, True)}


@on_devices(cpu=(FP16,))
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", ORDERS)
def test_orders_of_base_product_and_expand(
    name: str, dropout: float, device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks, and with the base product added last; a stack of which one layer has no bias."""
    monkeypatch.setattr(tiles, "order", lambda *_: ORDERS[name])
    parts = [
        layer_inputs(RANKS, 112, 72, out, seed=out, gating="map").to(dtype, device=device) for out in (40, 56)
    ]
    parts = [replace(one, x=parts[0].x, gates=parts[0].gates, segments=parts[0].segments) for one in parts]
    parts[1] = replace(parts[1], bias=torch.zeros_like(parts[1].bias))
    x, gates = parts[0].x.clone().requires_grad_(), parts[0].gates.clone().requires_grad_()
    packs = [one.experts() for one in parts]
    layers = [(parts[0].weight, parts[0].bias, packs[0]), (parts[1].weight, None, packs[1])]
    with poisoned_allocations():
        ys = stacked_expert_lora(x, layers, gates, parts[0].segments, dropout=dropout, seed=5, impl="triton")
        torch.autograd.backward(ys, [one.dy for one in parts])
    mask = dropout_mask(5, *x.shape, dropout, device) if dropout else None
    factor = keep_scale(dropout) if dropout else 1.0
    for one, y, pack in zip(parts, ys, packs, strict=True):
        found = {"y": y.detach(), "da": pack.trained_a.grad, "db": pack.trained_b.grad}
        assert_within_rounding(found, one, mask, factor)
    alone = [run_layer(one, "triton", dropout=dropout, seed=5) for one in parts]
    torch.testing.assert_close(
        x.grad, alone[0]["dx"] + alone[1]["dx"], rtol=0, atol=8 * torch.finfo(dtype).eps
    )
