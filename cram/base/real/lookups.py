"""How the attention heads of the language model start: near the lookup of an option.

To name an option's letter, a head must carry the letter to the option's name, and another must find this name
from the question. From random weights this was not learnt within 1,100 steps of 2,048 tokens. So heads of the
first layer start by looking back 1, 2, 3 and 4 tokens. Those of the later layers start by looking for the
token that they stand on. Compare Olsson et al. (2022) on induction heads, and Trockman and Kolter (2023) on
mimetic initialization. The rows that train the lookup are in `pool.draw_lookups`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

STEPS_BACK = (1, 2, 3, 4)
# Rotary pairs that tell neighbouring tokens apart, and the first pair that hardly turns within a prompt.
PLACES, CONTENT = 8, 16
SHARPNESS = 4.0  # score of a head at its own distance, per pair, above that of a random one
MATCH, COPY, REST = 2.0, 0.5, 0.3  # lengths of rows: of matching, of copying, of random weights kept


def _rows(count: int, width: int) -> Tensor:
    """Random orthonormal rows [count, width]."""
    return torch.linalg.qr(torch.randn(width, count))[0].T


@torch.no_grad()
def start_heads(language_model: Any) -> None:
    """Overwrite the attention weights of a fresh Llama (`LlamaModel`, width D) by heads that look up.

    All embeddings get one vector more in common, which the heads that look back read.
    """
    config = language_model.config
    width, size, groups = config.hidden_size, config.head_dim, config.num_key_value_heads
    common = torch.nn.functional.normalize(torch.randn(width), dim=0)
    embeddings = language_model.embed_tokens.weight
    embeddings += embeddings.norm(dim=1).mean() * common
    gain = (SHARPNESS * size**0.5 * 2 / width) ** 0.5  # half of a normalised embedding's square is common
    copied = _rows(size, width)
    for depth, layer in enumerate(language_model.layers):
        attention = layer.self_attn
        for group in range(groups):
            keys = attention.k_proj.weight.view(groups, size, width)[group]
            queries = attention.q_proj.weight.view(groups, -1, size, width)[group]
            values = copied if depth or not group else _rows(size, width)
            values = COPY * (values - (values @ common)[:, None] * common)
            attention.v_proj.weight.view(groups, size, width)[group] = values
            outputs = attention.o_proj.weight.view(width, groups, -1, size)[:, group]
            outputs.copy_(values.T[:, None] / outputs.shape[1] ** 0.5)
            if depth:
                _match(keys, queries, torch.stack([common, *copied]))
            elif not group:
                _look_back(keys, queries, gain * common, config.rope_parameters["rope_theta"])


def _look_back(keys: Tensor, queries: Tensor, common: Tensor, theta: float) -> None:
    """Keys [d, D] and queries [heads, d, D] whose score is highest a few tokens back, at any token."""
    half = keys.shape[0] // 2
    turns = theta ** -(torch.arange(PLACES) / half)
    keys *= REST
    keys[:PLACES] += common
    for query, back in zip(queries, STEPS_BACK, strict=False):
        query *= REST
        query[:PLACES] += torch.cos(back * turns)[:, None] * common
        query[half : half + PLACES] -= torch.sin(back * turns)[:, None] * common


def _match(keys: Tensor, queries: Tensor, unread: Tensor) -> None:
    """Equal keys [d, D] and queries [heads, d, D], so that a token finds its like at any distance."""
    half = keys.shape[0] // 2
    rows = _rows(keys.shape[0], keys.shape[1])
    basis = torch.linalg.qr(unread.T)[0]
    rows -= rows @ basis @ basis.T
    rows[:CONTENT] = rows[half : half + CONTENT] = 0.0
    keys.copy_(MATCH * rows)
    queries.copy_(MATCH * rows)
