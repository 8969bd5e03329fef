"""Linears without experts in steps of a few rows, by the native layer's own product.

Torch's CPU product of three to eight rows reads a weight several times, whereas the native layer reads it
once. The adapted linears have that layer already; this module gives it to the others of the language model
and to the output head. Prompts and single rows stay with torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cram.model.attached import AttachedModel
from cram.model.frozen.forward import is_plain
from cram_kernels import PackedExperts, available_impls, expert_lora, pack_experts

LEAST_ROWS, MOST_ROWS = 3, 8


def use_native_products(model: Any) -> Callable[[], None]:
    """Let the plain linears of an attached model compute few rows natively, where the native layer can.

    Returns:
        A function that takes this back.
    """
    changed = []
    for linear in _plain_linears(model) if available_impls()["expert_lora"]["native"] is None else ():
        if linear.weight.device.type == "cpu" and linear.weight.dtype in (torch.float32, torch.bfloat16):
            linear.__dict__["forward"] = partial(_forward, linear, _no_expert(linear))
            changed.append(linear)

    def take_back() -> None:
        for linear in changed:
            linear.__dict__.pop("forward", None)

    return take_back


def _plain_linears(model: Any) -> Iterator[nn.Linear]:
    cram: AttachedModel = model.cram
    adapted = {id(each.base) for each in cram.modules.values()}
    language = model.get_submodule(cram.family.language_model)
    for module in (*language.modules(), model.get_output_embeddings()):
        if isinstance(module, nn.Linear) and id(module) not in adapted and is_plain(module):
            yield module


def _no_expert(linear: nn.Linear) -> PackedExperts:
    a = torch.zeros(0, linear.in_features, device=linear.weight.device)
    return pack_experts([a], [a.new_zeros(linear.out_features, 0)], 1.0)


def _forward(linear: nn.Linear, nothing: PackedExperts, x: Tensor) -> Tensor:
    rows = x.numel() // max(x.shape[-1], 1)
    if LEAST_ROWS <= rows <= MOST_ROWS and not torch.is_grad_enabled():
        return expert_lora(x, linear.weight, linear.bias, nothing, x.new_ones(1, 1, dtype=torch.float32))
    return F.linear(x, linear.weight, linear.bias)
