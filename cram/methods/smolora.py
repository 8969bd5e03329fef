"""SMoLoRA (arXiv 2411.13949): a visual and an instruction half of LoRAs, one expert of each fused per token.

    y = W0 x + b + alpha u + beta f        u = scale B_v A_v x,  f = scale B_i A_i x
    v = argmax R_v mean(x),  i = argmax R_i e        [alpha, beta] = softmax([I_v . u, I_f . f]) per token

Each half has four experts. mean(x) runs over the sample's tokens, and e is the feature of its instruction.
I_v . u is linear in x. So the fusion scores are one small product of x with the rows scale A_k^T B_k^T I, and
the layer is the usual expert layer under token gates.

Faithful to the released code: a hard top-1 gate passes no gradient to its router. The released code "trains"
R_v and R_i in the first task only, so they keep their initial values. In this package they are saved
constants. Every task trains the experts and I_v, I_f. The scale is inside the fusion scores.

Own reading: e is CLIP's text feature. The released code has one sentence embedding per task, its instruction
type, and is told which to take. With `instruction_types` e is the mean feature of the task's training
instructions. Nothing is told: a question takes the nearest mean by cosine. The mean of x leaves out padding;
the released mean depends on the batch. Logits are made without dropout. A and the routers start as in the
other methods, and each expert has rank `rank`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cram.methods.base import Method, MethodState
from cram.methods.parts.anchors import Anchors, cosines
from cram.methods.parts.separable import HALF, SeparableGating
from cram.model.attached import AttachedModel
from cram.model.factors import new_lora
from cram.routing.means import CentroidMean
from cram.routing.query import Query, Route

TYPES = "instruction_types"
EXPERTS = tuple(f"{half}{index}" for half in ("visual", "instruction") for index in range(HALF))


class SMoLoraMethod(Method):
    """Two halves of four experts that every task trains further."""

    name = "smolora"
    pool = EXPERTS
    uses_queries = True
    budget = "pool"

    def __init__(self, cram: AttachedModel) -> None:
        """Installs routers and fusion in every module."""
        super().__init__(cram)
        self._types = Anchors(cram.encoder.text_dim) if self.config.instruction_types else None
        self._gatings: list[SeparableGating] = []
        for module in cram.modules.values():
            gating = SeparableGating(module, cram.encoder.text_dim).to(module.weight.device)
            self._gatings.append(gating)
            module.gating = gating

    def begin_task(self, task: str, total_steps: int) -> None:
        """Train experts and fusion: new ones in the first task, later the ones of the last task."""
        cram = self.cram
        if not cram.num_experts:
            for gating in self._gatings:
                gating.reset()
        pool = [cram.expert_weights(index) for index in range(cram.num_experts)]
        pool = pool or [new_lora(cram.modules, self.config.rank) for _ in EXPERTS]
        cram.set_experts(EXPERTS, pool, len(EXPERTS))
        for gating in self._gatings:
            gating.requires_grad_(True)
        if self._types is not None:
            self._types.begin()

    def observe(self, query: Query) -> None:
        """Move the task's instruction type to the mean over all samples seen so far."""
        if self._types is not None:
            self._types.update(query.text)

    def training_means(self) -> dict[str, CentroidMean]:
        """Return the mean that the instruction type follows."""
        return {} if self._types is None else {"text": self._types.mean}

    def import_training(
        self, task: str, total_steps: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
    ) -> None:
        """Begin a task again and take up an exported training, with the instruction type."""
        super().import_training(task, total_steps, tensors, values)
        if self._types is not None:
            self._types.follow()

    def export_state(self) -> MethodState:
        """Return the gatings' tensors, and the instruction types [T, D_t] of the tasks if they are used."""
        tensors, values = super().export_state()
        return MethodState(tensors if self._types is None else {**tensors, TYPES: self._types.rows}, values)

    def import_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take up the gatings' tensors and the instruction types."""
        types = self._types
        if types is None:
            super().import_state(tensors, values)
            return
        stored, width = tensors.get(TYPES), types.rows.shape[1]
        if stored is None or stored.dim() != 2 or stored.shape[1] != width:
            got = "none" if stored is None else list(stored.shape)
            raise ValueError(f"method state {TYPES} must have shape [tasks, {width}], got {got}")
        before, types.rows = types.rows, stored.clone()
        try:
            super().import_state(tensors, values)
        except ValueError:
            types.rows = before
            raise

    def end_task(self) -> None:
        """Freeze experts and fusion."""
        super().end_task()
        for gating in self._gatings:
            gating.requires_grad_(False)

    def route(self, query: Query | None, training: bool) -> Route:
        """Return a route whose features are those of the instructions [S, D_t]."""
        assert query is not None
        gates = torch.ones(self.cram.num_layers, len(query), self.cram.num_experts)
        return Route(gates, features=self._features(query, training))

    def _features(self, query: Query, training: bool) -> Tensor:
        """The instruction features [S, D_t]: the samples' own, or those of their types."""
        if self._types is None:
            return query.text
        rows = self._types.rows.to(query.text)
        if not training:
            return rows[cosines(query.text, rows).argmax(-1)]
        # Before the first step was observed, its batch stands for the task.
        newest = rows[-1] if self._types.mean.count else query.text.mean(0)
        return newest.expand(len(query), -1)
