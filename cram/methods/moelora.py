"""MoELoRA of CoIN (arXiv 2403.08350): a router in every module weighs 8 LoRAs per token. All always train.

    y = W0 x + b + sum_e softmax(W_g x)_e * scale * B_e A_e x

Faithful to the released code: the softmax is dense and per token. Every module has a router W_g [8, D_in]
without bias, which reads the layer's input without dropout. All tasks share experts and routers, and each
task trains them further. There is no auxiliary loss.

Own reading: the target linears are the configuration's, each expert has rank `rank`, and the router starts
with the initial values of `nn.Linear`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cram.methods.base import Method
from cram.model.attached import AttachedModel
from cram.model.factors import initial_rows, new_lora
from cram.model.gating import LayerGating
from cram.model.state import ForwardState

EXPERTS = tuple(f"expert{index}" for index in range(8))


class TokenRouter(LayerGating):
    """Gates softmax(W_g x) per token. A decode step needs nothing from the prefill."""

    def __init__(self, in_features: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(experts, in_features), requires_grad=False)

    def reset(self) -> None:
        """Draw the initial values of `nn.Linear`."""
        self.weight.data.copy_(initial_rows(*self.weight.shape))

    def forward(self, x: Tensor, route: Tensor, state: ForwardState) -> Tensor:
        """Return gates [B * T, E] for x [B, T, D_in]."""
        logits = F.linear(x, self.weight.to(x.dtype)).flatten(0, -2)
        return logits.softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32))


class MoELoraMethod(Method):
    """One pool of experts and routers that every task trains further."""

    name = "moelora"
    pool = EXPERTS
    budget = "pool"

    def __init__(self, cram: AttachedModel) -> None:
        """Installs a router in every module."""
        super().__init__(cram)
        for module in cram.modules.values():
            module.gating = TokenRouter(module.in_features, len(EXPERTS)).to(module.weight.device)

    def begin_task(self, task: str, total_steps: int) -> None:
        """Train experts and routers: new ones in the first task, later the ones of the last task."""
        cram = self.cram
        if cram.num_experts:
            weights = [cram.expert_weights(index) for index in range(len(EXPERTS))]
        else:
            weights = [new_lora(cram.modules, self.config.rank) for _ in EXPERTS]
            for router in self._routers():
                router.reset()
        cram.set_experts(EXPERTS, weights, trained=len(EXPERTS))
        for router in self._routers():
            router.requires_grad_(True)

    def end_task(self) -> None:
        """Freeze experts and routers."""
        super().end_task()
        for router in self._routers():
            router.requires_grad_(False)

    def _routers(self) -> list[TokenRouter]:
        gatings = [module.gating for module in self.cram.modules.values()]
        return [gating for gating in gatings if isinstance(gating, TokenRouter)]
