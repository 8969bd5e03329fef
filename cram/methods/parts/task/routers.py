"""One router per task in every module. It chooses the k best experts by the first token of each sample.

g(s) = softmax over the k largest of W_t(s) x_1(s)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cram.methods.parts.task.sums import over_processes
from cram.model.factors import initial_rows
from cram.model.gating import LayerGating, first_tokens, top_gates
from cram.model.state import ForwardState


class TaskRouters(LayerGating):
    """The routers of one module.

    Attributes:
        finished: Routers [T, E, D_in] of the finished tasks.
        router: The router [1, E, D_in] of the task in training, or None.
        used: Summed gates [E] of the task's training forwards in this process.
    """

    gathered = ("used",)
    finished: Tensor
    used: Tensor
    router: nn.Parameter | None

    def __init__(self, path: str, experts: int, in_features: int, k: int) -> None:
        """Starts without routers.

        Args:
            path: The module's path.
            experts: Number of experts, E.
            in_features: Width of the module's input, D_in.
            k: Experts per sample.
        """
        super().__init__()
        self.path, self.k = path, k
        self.register_buffer("finished", torch.zeros(0, experts, in_features))
        self.register_buffer("used", torch.zeros(experts), persistent=False)
        self.register_parameter("router", None)

    def routers(self) -> Tensor:
        """Return the routers [T, E, D_in] of all tasks. The router in training comes last."""
        return self.finished if self.router is None else torch.cat([self.finished, self.router])

    def begin(self) -> None:
        """Start a task's router with the initial values of `nn.Linear`."""
        router = initial_rows(*self.finished.shape[1:])
        self.router = nn.Parameter(router[None].to(self.finished.device))
        self.used.zero_()

    def use(self) -> Tensor:
        """Return the summed gates [E] of the task's training forwards in all processes."""
        return over_processes({"used": self.used}, self.used.device)["used"]

    def finish(self, order: list[int]) -> None:
        """End the task. Expert `order[i]` becomes expert i in all routers."""
        self.finished, self.router = self.routers().detach()[:, order], None

    def forward(self, x: Tensor, route: Tensor, state: ForwardState) -> Tensor:
        """Return gates [B, E] by the routers of the samples' tasks, the route's features [S, 1]."""
        assert state.features is not None
        tasks = state.features[:, 0].long()
        if len(x) != len(tasks):
            tasks = tasks.repeat_interleave(len(x) // len(tasks), 0)
        return state.once(self.path, lambda: self._gates(first_tokens(x, state.mask), tasks, state))

    def _gates(self, first: Tensor, tasks: Tensor, state: ForwardState) -> Tensor:
        gates = top_gates((self._own(tasks) @ first[:, :, None])[:, :, 0], self.k)
        if self.training and state.counts(self.path):
            self.used += gates.detach().sum(0)
        return gates

    def _own(self, tasks: Tensor) -> Tensor:
        """The router [B, E, D_in] of each row's task."""
        count = len(self.finished)
        if self.router is None:
            return self.finished.index_select(0, tasks)
        if not count:
            return self.router.expand(len(tasks), -1, -1)
        finished = self.finished.index_select(0, tasks.clamp(max=count - 1))
        return torch.where((tasks == count)[:, None, None], self.router, finished)
