"""SMoLoRA's gating of one linear: the two hard choices, and the fusion of the chosen experts per token.

    v = argmax R_v mean(x),  i = argmax R_i e        [alpha, beta] = softmax([I_v . u, I_f . f]) per token

u and f are the outputs of the chosen experts. I_v . u is linear in x. So the fusion scores are one small
product of x with the rows scale A_k^T B_k^T I.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cram.model.factors import initial_rows
from cram.model.gating import LayerGating, token_means, top_gates
from cram.model.linear import ExpertLinear
from cram.model.state import ForwardState
from cram_kernels import PackedExperts

HALF = 4  # experts of each half


def fusion_rows(experts: PackedExperts, fusion: Tensor) -> Tensor:
    """Rows scale A_e^T B_e^T I [E, D_in] with I_v, I_f in fusion [2, D_out]. Row e times x is e's score."""
    whole = experts.trained_a is not None and len(experts.trained_a) == len(experts.a)
    a, bt = (experts.trained_a, experts.trained_b) if whole else (experts.a, experts.bt)
    assert a is not None and bt is not None
    half = len(bt) // 2
    both = F.linear(bt, fusion)  # [E r, 2]; each row needs the column of its own half
    scores = experts.scale * torch.cat([both[:half, 0], both[half:, 1]])
    own = torch.diag_embed(scores.view(experts.num_experts, -1).t(), 0, 0, 1)  # [E, E, r]
    return own.flatten(1) @ a


def fused_gates(x: Tensor, others: Tensor, rows: Tensor) -> Tensor:
    """Return token gates [B * T, E] of x [B, T, D_in]: a softmax over the experts outside `others` [B, E]."""
    scores = F.linear(x, rows.to(x.dtype)).masked_fill(others[:, None], -torch.inf)
    return scores.softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32)).flatten(0, 1)


class SeparableGating(LayerGating):
    """Routers and fusion of one module."""

    reads_prompts = True
    visual_router: Tensor
    instruction_router: Tensor

    def __init__(self, linear: ExpertLinear, text_dim: int) -> None:
        super().__init__()
        self._linear = (linear,)  # in a tuple, so that torch does not register the linear as a submodule
        self.register_buffer("visual_router", torch.zeros(HALF, linear.in_features))
        self.register_buffer("instruction_router", torch.zeros(HALF, text_dim))
        self.fusion = nn.Parameter(torch.zeros(2, linear.out_features), requires_grad=False)
        self._folded: tuple[PackedExperts, Tensor] | None = None

    def reset(self) -> None:
        """Draw the initial values of `nn.Linear`."""
        for weight in (self.visual_router, self.instruction_router):
            weight.copy_(initial_rows(*weight.shape))
        bound = 1 / math.sqrt(self.fusion.shape[1])
        nn.init.uniform_(self.fusion, -bound, bound)

    def forward(self, x: Tensor, route: Tensor, state: ForwardState) -> Tensor:
        """Return gates [B * T, E] for x [B, T, D_in]. The route's features are the instructions' [S, D_t]."""
        linear = self._linear[0]
        experts, features, name = linear.experts, state.features, linear.name
        assert experts is not None and features is not None

        def choose() -> Tensor:
            """Return [B, E], True where a row leaves an expert out. A hard choice has no gradient."""
            visual = token_means(x.detach(), state.mask) @ self.visual_router.t()
            instruction = features @ self.instruction_router.t()
            instruction = instruction.repeat_interleave(len(x) // len(features), 0)
            return torch.cat([top_gates(visual, 1), top_gates(instruction, 1)], 1) == 0

        rows = self._rows(experts, state)
        return fused_gates(x, state.once(f"{name}.others", choose), rows)

    def _rows(self, experts: PackedExperts, state: ForwardState) -> Tensor:
        """Return `fusion_rows`. Frozen experts and fusion compute them once."""
        if experts.trained or self.fusion.requires_grad:
            return state.once(f"{self._linear[0].name}.rows", lambda: fusion_rows(experts, self.fusion))
        owner, rows = self._folded or (None, self.fusion)
        if owner is not experts or rows.device != experts.a.device:
            rows = fusion_rows(experts, self.fusion).detach()
            self._folded = experts, rows
        return rows

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._folded = None
