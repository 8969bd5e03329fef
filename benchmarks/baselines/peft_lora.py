"""PEFT's own LoRA layer: one adapter of the experts' total rank, and one adapter of the usual rank 9."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from benchmarks.problem import SCALE, Layer, Problem, leaf


def peft_lora(p: Problem, rank: int | None = None) -> Layer:
    """y = W0 x + b + s B A x without gates, by `peft`. Adapter weights are in x.dtype; there is no dropout.

    Args:
        p: The problem.
        rank: Rank of the adapter, which gets the first packed rows. None takes all rows.
    """
    from peft import LoraConfig, inject_adapter_in_model

    a, bt = p.packed_a[:rank], p.packed_bt[:rank]
    linear = nn.Linear(1, 1, device="meta")
    linear.in_features, linear.out_features = p.weight.shape[1], p.weight.shape[0]
    linear.weight = nn.Parameter(p.weight, requires_grad=False)
    linear.bias = None if p.bias is None else nn.Parameter(p.bias, requires_grad=False)
    config = LoraConfig(
        r=len(a), lora_alpha=int(SCALE * len(a)), lora_dropout=0.0, target_modules=["projection"]
    )
    model = inject_adapter_in_model(config, nn.ModuleDict({"projection": linear}))
    layer = model["projection"]
    down, up = layer.lora_A["default"], layer.lora_B["default"]
    with torch.no_grad():
        down.weight, up.weight = nn.Parameter(a.clone()), nn.Parameter(bt.t().contiguous())
    layer.train(p.case.training)
    x = leaf(p.x)
    return Layer(lambda: layer(x), {"x": x, "peft_a": down.weight, "peft_b": up.weight})


peft_rank9 = partial(peft_lora, rank=9)
