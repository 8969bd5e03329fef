"""The adapted linear: a frozen base linear plus the packed experts of its module.

    y = W0 x + b + sum_e gates[s, e] * scale * B_e A_e dropout(x)

The gates come from the routing state that all layers of a model share; a row of x belongs to sample s = row
// k where k = rows / samples, because generation expands every sample into consecutive rows (beams, returned
sequences).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cram.siblings import Siblings
from cram_kernels import PackedExperts, expert_lora, pack_experts, visual_mean


class LayerState:
    """What the adapted linears of one model read during a forward; written once per forward, before the
    layers.

    The state is replaced and never cleared: gradient checkpointing runs the layers again during the backward
    pass and must find the same gates.

    Attributes:
        gates: Per decoder layer the gates [S, E], or None before the first route.
        disabled: Whether the experts are switched off, so that every layer is its base linear.
        visual: Visual-token positions [B, T] (bool) while the penalty needs the inputs' means, else None.
    """

    def __init__(self) -> None:
        self.gates: tuple[Tensor, ...] | None = None
        self.disabled = False
        self.visual: Tensor | None = None
        self._pooled: tuple[Tensor, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies leave out the gates, which belong to a live autograd graph."""
        return {**self.__dict__, "gates": None, "visual": None, "_pooled": None}

    def begin(self, gates: Tensor | None, disabled: bool, visual: Tensor | None) -> None:
        """Sets what the next forward uses; gates [L, S, E]."""
        self.gates = None if gates is None else gates.unbind(0)
        self.disabled, self.visual, self._pooled = disabled, visual, None

    def pool(self, x: Tensor, visual: Tensor) -> Tensor:
        """Mean of x [B, T, D] over its visual tokens, [B, D]; q, k and v share one input and one pooling."""
        if self._pooled is None or self._pooled[0] is not x:
            self._pooled = (x, visual_mean(x.detach(), visual))
        return self._pooled[1]


class ExpertLinear(nn.Module):
    """A frozen linear with the experts of its module.

    Attributes:
        base: The linear it stands for; untouched.
        experts: All experts of the module in float32, or None before the first one.
        buffer: The warm-up LoRA; while it exists it acts alone, with gate 1.
        siblings: The linears that read the same input, if there are any; see `cram.siblings`.
        layer: Index of the decoder layer.
        name: Module path in the base model.
        hidden: Visual-token mean of the last training input [B, D_in], for the penalty. Detached: the layer's
            input carries a graph only where gradient checkpointing is off, and the penalty's gradient must
            not depend on that.
    """

    experts: PackedExperts | None
    buffer: PackedExperts | None

    def __init__(self, base: nn.Linear, layer: int, name: str, state: LayerState, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.experts = None
        self.buffer = None
        self.layer, self.name, self.dropout = layer, name, dropout
        self.state = state
        self.siblings: Siblings | None = None
        self.hidden: Tensor | None = None
        self._one: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Output [..., D_out] for x [..., D_in], in the dtype of x.

        Raises:
            ValueError: If the module has experts and nothing has been routed.
        """
        state, packed, base = self.state, self.packed, self.base
        if state.disabled or packed is None:
            return base(x)
        gates = self._gates()
        if state.visual is not None:
            self.hidden = state.pool(x, state.visual.to(x.device))
        if not self.training or not self.dropout or not packed.trained:
            found = None
            if self.siblings is not None and self.buffer is None:
                found = self.siblings.output(self, x, gates)
            if found is None:
                found = expert_lora(x, base.weight, base.bias, packed, gates.to(x.device))
            return found
        # From torch's generator: checkpointing restores its state before it runs a layer again.
        seed = int(torch.randint(2**31 - 1, ()))
        return expert_lora(
            x, base.weight, base.bias, packed, gates.to(x.device), dropout=self.dropout, seed=seed
        )

    @property
    def packed(self) -> PackedExperts | None:
        """What acts beside the base linear: the warm-up LoRA while it exists, else the experts."""
        return self.experts if self.buffer is None else self.buffer

    def _gates(self) -> Tensor:
        """The gates of what acts; the warm-up LoRA acts on every sample, with gate 1."""
        gates = self.state.gates
        if self.buffer is not None:
            assert self._one is not None
            return self._one
        if gates is None:
            raise ValueError(f"{self.name} must be routed before it runs, got experts without gates")
        return gates[self.layer]

    def append(self, a: Tensor, b: Tensor, scale: float, trained: bool) -> None:
        """Appends an expert, a [r, D_in] and b [D_out, r]; the experts before it are frozen."""
        a, b = (factor.detach().to(self.base.weight.device, torch.float32) for factor in (a, b))
        if self.experts is None:
            self.experts = pack_experts([a], [b], scale, trained=int(trained))
        else:
            self.experts = self.experts.append(a, b, trained=int(trained))

    def begin_buffer(self, rank: int, scale: float) -> None:
        """Starts the warm-up LoRA: rank min(rank, D_in, D_out), A uniform as LoRA starts it, B zero."""
        weight = self.base.weight
        rank = min(rank, *weight.shape)
        a = torch.empty(rank, weight.shape[1])
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        b = torch.zeros(weight.shape[0], rank)
        self.buffer = pack_experts([a.to(weight.device)], [b.to(weight.device)], scale, trained=1)
        self._one = torch.ones(1, 1, device=weight.device)

    def end_buffer(self) -> None:
        """Drops the warm-up LoRA."""
        self.buffer, self._one = None, None

    def factors(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Detached factors (a [r, D_in], b [D_out, r]) of some experts."""
        if not indices:
            return []
        assert self.experts is not None
        pairs = [self.experts.expert(index) for index in indices]
        return [(a.detach(), b.detach()) for a, b in pairs]

    def buffer_factors(self) -> tuple[Tensor, Tensor]:
        """Detached factors (a [r, D_in], b [D_out, r]) of the warm-up LoRA."""
        assert self.buffer is not None
        a, b = self.buffer.expert(0)
        return a.detach(), b.detach()

    def trainable(self) -> list[nn.Parameter]:
        """The leaf parameters in training: those of the buffer while it exists, else those of the newest
        expert."""
        packed = self.packed
        if packed is None or packed.trained_a is None or packed.trained_b is None:
            return []
        return [packed.trained_a, packed.trained_b]

    @property
    def weight(self) -> Tensor:
        """The base weight [D_out, D_in], for code that asks a linear for its dtype or device."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The base bias [D_out] or None."""
        return self.base.bias

    @property
    def in_features(self) -> int:
        """D_in."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """D_out."""
        return self.base.out_features
