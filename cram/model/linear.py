"""The adapted linear: a frozen base linear plus the packed experts of its module.

    y = W0 x + b + sum_e gates[s, e] * scale * B_e A_e dropout(x)

The gates come from the state of the forward, or from the module's own gating. Row i of x belongs to sample
s = i // k with k = rows / samples, because generation expands every sample into consecutive rows (beams,
returned sequences).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cram.model.factors import Factors
from cram.model.frozen.forward import beside, device_of, in_place, plain_tensors
from cram.model.gating import LayerGating
from cram.model.stack import Layer, Stack, bound, pays, placed
from cram.model.state import Current, ForwardState
from cram.routing.means import moved, without_autocast
from cram_kernels import PackedExperts, expert_lora, pack_experts

# What the names of an adapted linear's tensors begin with; any other name is one of the base.
PARTS = ("base", "experts", "solo", "gating")
# In place of a call that was not asked for yet; None stands for one that is made anew each time.
_UNKNOWN: Any = object()


def is_peft_layer(module: nn.Module) -> bool:
    """Whether a module is a layer of PEFT, which keeps the layer that it adapts as `base_layer`."""
    return "base_layer" in module._modules


class ExpertLinear(nn.Module):
    """A frozen linear with the experts of its module.

    Attributes:
        base: The linear that it stands for; untouched. A plain one is computed together with the experts from
            its weight, any other is called (see `cram.model.frozen.forward`).
        experts: All experts of the module in float32, or None before the first one.
        solo: Experts that act alone, each with gate 1: in training or not while they are trained, afterwards
            only outside of training mode and where the route does not override them. CRAM's warm-up LoRA is
            one, the merged experts of other methods are another. A bundle does not hold it.
        gating: Makes the gates from the module's input; None for those of the route.
        stack: The linears that read the same input, if there are any; see `cram.model.stack`.
        layer: Index of the decoder layer.
        name: Module path in the base model.
        current: Where the state of the forward is.
    """

    experts: PackedExperts | None
    solo: PackedExperts | None
    gating: LayerGating | None

    def __init__(self, base: nn.Linear, layer: int, name: str, current: Current, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.experts = None
        self.solo = None
        self.gating = None
        self.layer, self.name, self.dropout = layer, name, dropout
        self.current = current
        self.stack: Stack | None = None
        self._one: Tensor | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuses an adapter of PEFT in place of the base; a quantised linear may take its place.

        Raises:
            ValueError: If the new base is a layer of PEFT.
        """
        if name == "base" and isinstance(value, nn.Module) and is_peft_layer(value):
            raise ValueError(
                f"target_modules must leave out the linears of an attached model, got {self.name}; pass the "
                "names of other linears (`model.cram.report.skipped`), or call `cram.detach(model)` first"
            )
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Takes the base's tensors also under the names that they have without experts."""
        for key in [key for key in state_dict if key.startswith(prefix)]:
            name = key.removeprefix(prefix)
            if name.split(".")[0] not in PARTS:
                state_dict[f"{prefix}base.{name}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExpertLinear:
        """Moves everything, and casts the base alone: experts stay float32."""
        for name, child in self._modules.items():
            if recurse and child is not None:
                child._apply(fn if name == "base" else partial(moved, fn))
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Output [..., D_out] for x [..., D_in], in the dtype of x.

        Raises:
            ValueError: If the module has experts and nothing has been routed.
        """
        state = self.current.state
        # A graph would keep the call of one cache.
        if not torch.compiler.is_dynamo_compiling() and state.calls is not None:
            found = self._repeated(x, state)
            if found is not None:
                return found
        packed = self.acting(state)
        base: Any = self._modules["base"]
        if state.disabled or packed is None:
            return base(x)
        plain = plain_tensors(base)
        gates = self._gates(x, packed, state)
        state.keep_visual_mean(self.name, x)
        dropped: dict[str, Any] = {}
        if self.training and self.dropout and packed.trained:
            # From torch's generator: checkpointing restores its state before it runs a layer again.
            dropped = {"dropout": self.dropout, "seed": torch.randint(2**31 - 1, (), device="cpu")}
        elif plain is not None and self.stack is not None and pays(x):
            found = self.stack.output(self, packed, x, gates)
            if found is not None:
                return found
        if plain is None:
            return beside(base, x, packed, gates, **dropped)
        return expert_lora(x, *plain, packed, placed(gates, x), **dropped)

    def _repeated(self, x: Tensor, state: ForwardState) -> Tensor | None:
        """The output for x by the call that an earlier decode step has bound, or None."""
        calls: Any = state.calls
        call = calls.get(self, _UNKNOWN)
        if call is _UNKNOWN:
            members = (self,) if self.stack is None else self.stack.members
            gates = None if state.disabled or members[0] is not self else state.gates
            call = None if gates is None else bound(members, x, gates[self.layer])
            calls.update(dict.fromkeys(members, call))
        return None if call is None else call.output(self, x)

    def as_layer(self) -> Layer | None:
        """Weight, bias and experts, if the base is plain and the route's gates are the experts' own."""
        state = self.current.state
        packed = self.acting(state)
        gating = self._modules.get("gating")
        if packed is not self._modules.get("experts") or not (gating is None or state.overrides_gating):
            return None
        plain = plain_tensors(self.base)
        return None if plain is None or packed is None else (*plain, packed)

    @property
    def device(self) -> torch.device:
        """Where the base computes, also while its weight is offloaded."""
        return device_of(self.base)

    def acting(self, state: ForwardState) -> PackedExperts | None:
        """The experts that act beside the base linear in a forward."""
        # nn.Module finds a submodule by name after its own attributes, at a microsecond each.
        find: Any = self._modules.get
        solo = find("solo")
        experts = find("experts")
        if solo is None or solo.trained:
            return experts if solo is None else solo
        # What the older tasks were merged to knows nothing of an expert in training.
        learning = self.training or (experts is not None and experts.trained)
        return experts if learning or state.overrides_gating else solo

    def _gates(self, x: Tensor, acting: PackedExperts, state: ForwardState) -> Tensor:
        """The gates of what acts: 1 of solo experts, else the gating's or the route's."""
        gating = self._modules.get("gating")
        if acting is not self._modules.get("experts"):
            if torch.compiler.is_compiling():
                return torch.ones(1, 1, device=x.device)
            one = self._one
            # What inference mode made cannot be saved for a backward.
            usable = one is not None and (torch.is_inference_mode_enabled() or not one.is_inference())
            if one is None or not usable or one.device != x.device:
                self._one = one = torch.ones(1, 1, device=x.device)
            return one
        if state.gates is None:
            raise ValueError(
                f"{self.name} must be routed before it runs, got experts without gates, as in a copy of a "
                "part of a model"
            )
        gates = state.gates[self.layer]
        if gating is None or state.overrides_gating:
            return gates
        with without_autocast(x.device):
            return gating(x, gates.to(x.device), state)

    def append(self, a: Tensor, b: Tensor, scale: float, trained: bool) -> None:
        """Appends an expert, a [r, D_in] and b [D_out, r]; the experts before it are frozen."""
        if self.experts is None:
            self.set_experts([(a, b)], scale, int(trained))
        else:
            self.experts = self.experts.append(*self._own(a, b), trained=int(trained))

    def set_experts(self, pairs: Sequence[Factors], scale: float, trained: int) -> None:
        """Replaces all experts by (a [r, D_in], b [D_out, r]) of which the last `trained` are trained.

        Experts whose a is one and the same tensor share it in the pack.
        """
        self.experts = self._packed(pairs, scale, trained)

    def set_solo(self, pair: Factors | None, scale: float, trained: bool) -> None:
        """Replaces the solo experts by one, (a [r, D_in], b [D_out, r]), or by none; see `solo`."""
        self.solo = None if pair is None else self._packed([pair], scale, int(trained))

    def _packed(self, pairs: Sequence[Factors], scale: float, trained: int) -> PackedExperts | None:
        if not pairs:
            return None
        first = pairs[0][0]
        shared = len(pairs) > 1 and len({(a.data_ptr(), a.shape) for a, _ in pairs}) == 1
        a, b = zip(*(self._own(*pair) for pair in pairs), strict=True)
        return pack_experts(list(a), list(b), scale, trained, shared_a=shared and first.numel() > 0)

    def _own(self, a: Tensor, b: Tensor) -> Factors:
        """Detached factors in float32 on the device of the base."""
        device = self.device
        return a.detach().to(device, torch.float32), b.detach().to(device, torch.float32)

    def factors(self, indices: Sequence[int]) -> list[Factors]:
        """Detached factors (a [r, D_in], b [D_out, r]) of some experts."""
        if not indices:
            return []
        assert self.experts is not None
        with in_place(self.experts) as experts:
            pairs = [experts.expert(index) for index in indices]
            return [(a.detach(), b.detach()) for a, b in pairs]

    def solo_factors(self) -> Factors:
        """Detached factors (a [r, D_in], b [D_out, r]) of the solo expert."""
        assert self.solo is not None
        a, b = self.solo.expert(0)
        return a.detach(), b.detach()

    def trainable(self) -> list[nn.Parameter]:
        """The leaf parameters in training: those of a solo expert in training alone, else those of the
        experts in training and of the gating."""
        alone = self.solo is not None and self.solo.trained > 0
        packed = self.solo if alone else self.experts
        found: list[nn.Parameter] = []
        if packed is not None and packed.trained_a is not None and packed.trained_b is not None:
            found = [p for p in (packed.trained_a, packed.trained_b) if p.requires_grad]
        if self.gating is not None and not alone:
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
