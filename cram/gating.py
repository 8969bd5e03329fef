"""Gates that a layer makes from its own input, for methods whose router is a part of every module.

y = W0 x + b + sum_e g(x)[t, e] * scale * B_e A_e dropout(x)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from cram.grouping import Float32Module

if TYPE_CHECKING:
    from cram.experts import LayerState


class LayerGating(Float32Module):
    """Base of the gatings: `linear.gating` of an adapted linear, installed by a method.

    Parameters are float32, also on a model in half precision; those with `requires_grad` are trained.
    Products with x belong in the dtype of x, the softmax over experts in float32.
    """

    def forward(self, x: Tensor, route: Tensor, state: LayerState) -> Tensor:
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
