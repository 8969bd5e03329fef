"""The adapted linear: a frozen base linear plus the packed experts of its module.

    y = W0 x + b + sum_e gates[s, e] * scale * B_e A_e dropout(x)

The gates come from the routing state that all layers of a model share, or from the module's own gating; a
row of x belongs to sample s = row // k where k = rows / samples, because generation expands every sample into
consecutive rows (beams, returned sequences).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cram.model.gating import LayerGating
from cram.model.stack import Siblings, pays
from cram.routing.query import Route
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
        features: The route's features [S, F], or None.
        mask: Real tokens [B, T] (bool) of a prefill or training forward; None for all.
        memory: What `once` holds; it lives with the KV cache that is made under it.
        decoding: Whether the forward continues a KV cache.
        final: Whether the route's gates are used as they are; see `Route.final`.
    """

    def __init__(self) -> None:
        self.gates: tuple[Tensor, ...] | None = None
        self.disabled = False
        self.visual: Tensor | None = None
        self.features: Tensor | None = None
        self.mask: Tensor | None = None
        self.memory: dict[str, Tensor] = {}
        self.decoding = False
        self.final = False
        self._pooled: tuple[Tensor, Tensor] | None = None
        self._one: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies leave out what belongs to a live autograd graph or to one forward."""
        live = dict.fromkeys(("gates", "visual", "features", "mask", "_pooled", "_one"))
        return {**self.__dict__, **live, "memory": {}}

    def begin(
        self,
        route: Route | None,
        device: torch.device | str = "cpu",
        *,
        disabled: bool = False,
        visual: Tensor | None = None,
        mask: Tensor | None = None,
        decoding: bool = False,
    ) -> None:
        """Sets what the next forward uses, the route's tensors on `device`."""
        features = None if route is None else route.features
        self.gates = None if route is None else route.gates.to(device).unbind(0)
        self.features = None if features is None else features.to(device)
        self.memory = {} if route is None else route.memory
        self.final = route is not None and route.final
        self.disabled, self.visual, self._pooled = disabled, visual, None
        self.mask, self.decoding = mask, decoding

    def once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What `make` returned at the prefill of this cache; outside of decoding it is made anew.

        A generation's rows are those of its prefill, so the tensor fits every decode step; it has no gradient
        there.

        Args:
            name: Unlike all other names of the model: put the module's path in front.
            make: Computes the tensor from the prefill's whole input.

        Raises:
            ValueError: If the cache was made by a forward that made no such tensor.
        """
        if self.decoding:
            if name not in self.memory:
                raise ValueError(f"{name} must come from the prefill of the cache, got a cache without it")
            return self.memory[name]
        made = make()
        self.memory[name] = made.detach()
        return made

    def one(self, device: torch.device) -> Tensor:
        """Gates [1, 1] of 1, the same tensor for all modules of a device."""
        if self._one is None or self._one.device != device:
            self._one = torch.ones(1, 1, device=device)
        return self._one

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
        merged: Frozen experts that act alone, each with gate 1, whenever the module is not in training mode.
            Derived data: a bundle does not hold them.
        gating: Makes the gates from the module's input; None for those of the route.
        siblings: The linears that read the same input, if there are any; see `cram.model.stack`.
        layer: Index of the decoder layer.
        name: Module path in the base model.
        hidden: Visual-token mean of the last training input [B, D_in], for the penalty. Detached: the layer's
            input carries a graph only where gradient checkpointing is off, and the penalty's gradient must
            not depend on that.
    """

    experts: PackedExperts | None
    buffer: PackedExperts | None
    merged: PackedExperts | None
    gating: LayerGating | None

    def __init__(self, base: nn.Linear, layer: int, name: str, state: LayerState, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.experts = None
        self.buffer = None
        self.merged = None
        self.gating = None
        self.layer, self.name, self.dropout = layer, name, dropout
        self.state = state
        self.siblings: Siblings | None = None
        self.hidden: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Output [..., D_out] for x [..., D_in], in the dtype of x.

        Raises:
            ValueError: If the module has experts and nothing has been routed.
        """
        state, packed = self.state, self.acting
        base: Any = self._modules["base"]
        if state.disabled or packed is None:
            return base(x)
        gates = self._gates(x, packed)
        if state.visual is not None:
            self.hidden = state.pool(x, state.visual.to(x.device))
        dropped: dict[str, Any] = {}
        if self.training and self.dropout and packed.trained:
            # From torch's generator: checkpointing restores its state before it runs a layer again.
            dropped = {"dropout": self.dropout, "seed": int(torch.randint(2**31 - 1, ()))}
        elif self.siblings is not None and pays(x):
            found = self.siblings.output(self, packed, x, gates)
            if found is not None:
                return found
        return expert_lora(x, base.weight, base.bias, packed, gates.to(x.device), **dropped)

    @property
    def acting(self) -> PackedExperts | None:
        """What acts beside the base linear: the warm-up LoRA while it exists, else the merged experts outside
        of training mode unless the route is final, else the experts."""
        # nn.Module finds a submodule by name after its own attributes, at a microsecond each.
        find: Any = self._modules.get
        buffer = find("buffer")
        if buffer is not None:
            return buffer
        merged = None if self.training else find("merged")
        return find("experts") if merged is None or self.state.final else merged

    @property
    def shares_gates(self) -> bool:
        """Whether the gates of what acts are the route's, which a layer's linears have in common."""
        return (self.gating is None or self.state.final) and self.acting is self.experts

    def _gates(self, x: Tensor, acting: PackedExperts) -> Tensor:
        """The gates of what acts: 1 of the warm-up LoRA and of merged experts, else the gating's or the
        route's."""
        gates, gating = self.state.gates, self._modules.get("gating")
        if acting is not self._modules.get("experts"):
            return self.state.one(x.device).expand(1, acting.gate_columns)
        if gates is None:
            raise ValueError(f"{self.name} must be routed before it runs, got experts without gates")
        if gating is None or self.state.final:
            return gates[self.layer]
        return gating(x, gates[self.layer].to(x.device), self.state)

    def append(self, a: Tensor, b: Tensor, scale: float, trained: bool) -> None:
        """Appends an expert, a [r, D_in] and b [D_out, r]; the experts before it are frozen."""
        a, b = (factor.detach().to(self.base.weight.device, torch.float32) for factor in (a, b))
        if self.experts is None:
            self.experts = pack_experts([a], [b], scale, trained=int(trained))
        else:
            self.experts = self.experts.append(a, b, trained=int(trained))

    def set_experts(self, pairs: Sequence[tuple[Tensor, Tensor]], scale: float, trained: int) -> None:
        """Replaces all experts by (a [r, D_in], b [D_out, r]) of which the last `trained` are trained.

        Experts whose a is one and the same tensor share it in the pack.
        """
        self.experts = None
        if pairs:
            device = self.base.weight.device
            a, b = ([f.detach().to(device, torch.float32) for f in side] for side in zip(*pairs, strict=True))
            shared = len(pairs) > 1 and len({(f.data_ptr(), f.shape) for f, _ in pairs}) == 1
            shared = shared and pairs[0][0].numel() > 0
            self.experts = pack_experts(a, b, scale, trained, shared_a=shared)

    def begin_buffer(self, rank: int, scale: float) -> None:
        """Starts the warm-up LoRA: rank min(rank, D_in, D_out), A uniform as LoRA starts it, B zero."""
        weight = self.base.weight
        rank = min(rank, *weight.shape)
        a = torch.empty(rank, weight.shape[1])
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        b = torch.zeros(weight.shape[0], rank)
        self.buffer = pack_experts([a.to(weight.device)], [b.to(weight.device)], scale, trained=1)

    def end_buffer(self) -> None:
        """Drops the warm-up LoRA."""
        self.buffer = None

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
        """The leaf parameters in training: those of the buffer while it exists, else those of the experts in
        training and of the gating."""
        packed = self.experts if self.buffer is None else self.buffer
        found: list[nn.Parameter] = []
        if packed is not None and packed.trained_a is not None and packed.trained_b is not None:
            found = [packed.trained_a, packed.trained_b]
        if self.gating is not None and self.buffer is None:
            found += [p for p in self.gating.parameters() if p.requires_grad]
        return found

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
