"""Gates that a layer makes from its own input, for methods whose router is a part of every module.

y = W0 x + b + sum_e g(x)[t, e] * scale * B_e A_e dropout(x)
"""

from __future__ import annotations

import torch
from torch import Tensor

from cram.model.state import ForwardState
from cram.routing.means import Float32Module


class LayerGating(Float32Module):
    """Base of the gatings: `linear.gating` of an adapted linear, installed by a method.

    Parameters are float32, also on a model in half precision; those with `requires_grad` are trained.
    Products with x belong in the dtype of x, the softmax over experts in float32.

    Attributes:
        gathered: Names of the buffers that sum over the samples of this process alone.
        reads_prompts: True if gates depend on tokens throughout a prompt, so that it must come in one piece.
    """

    gathered: tuple[str, ...] = ()
    reads_prompts: bool = False

    def forward(self, x: Tensor, route: Tensor, state: ForwardState) -> Tensor:
        """The gates of one call of the module.

        Args:
            x: The module's input [B, T, D_in].
            route: The layer's gates of the route [S, E]; B is a multiple of S, and a sample's rows follow
                each other.
            state: Features, mask and memory of this forward. A gate that depends on a whole sample (a mean,
                the first token) is made by `state.once`, because gates are fixed at prefill.

        Returns:
            float32 gates: [S', E] per sample, where S' divides B, or [B * T, E] per token.
        """
        raise NotImplementedError


def first_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """The first real token of each row of x [B, T, D], by mask [B, T] (bool; None: all): float32 [B, D]."""
    if mask is None:
        return x[:, 0].float()
    return x[torch.arange(len(x), device=x.device), mask.to(x.device).int().argmax(1)].float()


def token_means(x: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over the real tokens of each row of x [B, T, D], by mask [B, T] as above: [B, D].

    float32, or float64 for float64 x.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if mask is None:
        return x.mean(1, dtype=dtype)
    real = mask.to(x.device)[:, :, None]
    return torch.where(real, x, 0).sum(1, dtype=dtype) / real.sum(1).clamp(min=1)


def top_gates(logits: Tensor, k: int) -> Tensor:
    """Softmax over the k largest of logits [S, E], exactly 0 elsewhere: [S, E].

    With k = 1 the gate is exactly 1 and its gradient exactly 0.
    """
    values, index = logits.topk(k, -1)
    return torch.zeros_like(logits).scatter(-1, index, values.softmax(-1))
