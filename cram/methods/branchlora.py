"""BranchLoRA (arXiv 2506.02041): one A, eight branches B_i, a router a task, two more branches frozen a task.

    y = W0 x + b + sum_i g_i scale B_i A dropout(x)        g = softmax over the two largest of W_t x_1
    loss = cross-entropy + key loss (`parts.task_keys`)

x_1 is the first real token of the module's input. Each task has routers W_t and keys of its own. At test time
a sample's task is the one whose keys are the most similar to its features; that task's routers act.

Faithful: shared A (always trained), top-2 routing on the first token, routers and keys a task, weight 1 of
the key loss, the task by the sum of both similarities. Own reading of what is not public: the features are
CLIP's; the key loss is a mean over samples, so that it does not depend on the batch size; a branch's use is
its summed gate over the task's training; of a module's trained branches the two most used freeze, but never
the last two, so that every task has something to train; routers start as `nn.Linear` does; `rank` is the
rank of A.

With causal attention the state of the first token depends on no other: where all prompts begin alike, a
router gives all samples of its task the same branches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cram.methods.base import Method, MethodState, check_state
from cram.methods.parts.task_keys import TaskKeys
from cram.methods.parts.task_routers import TaskRouters
from cram.model.attached import AttachedModel
from cram.model.factors import Factors, new_lora
from cram.model.state import ForwardState
from cram.routing.query import Query, Route

BRANCHES = tuple(f"branch{index}" for index in range(8))
TOP = FROZEN_A_TASK = 2


def frozen_after(tasks: int) -> int:
    """How many branches are frozen after a number of tasks."""
    return min(FROZEN_A_TASK * tasks, len(BRANCHES) - FROZEN_A_TASK)


def pool_order(used: Tensor, frozen: int, freeze: int) -> list[int]:
    """Branches by their use [E]: the `frozen` first as they are, the `freeze` most used others, the rest."""
    trained = range(frozen, len(used))
    new = sorted(trained, key=lambda index: -float(used[index]))[:freeze]
    return [*range(frozen), *new, *(index for index in trained if index not in new)]


class BranchLoraMethod(Method):
    """A pool of branches in every module, the frozen ones first."""

    name = "branchlora"
    uses_queries = True
    budget = "branches"

    def __init__(self, cram: AttachedModel) -> None:
        """Installs routers in every module."""
        super().__init__(cram)
        self._keys = TaskKeys(cram.encoder.image_dim, cram.encoder.text_dim, cram.device)
        self._gatings: dict[str, TaskRouters] = {}
        for path, module in cram.modules.items():
            gating = TaskRouters(path, len(BRANCHES), module.in_features, TOP).to(module.weight.device)
            module.gating = self._gatings[path] = gating

    def begin_task(self, task: str, total_steps: int) -> None:
        """Put A and the branches that are not frozen into training, with a new router and new keys."""
        pool = self._pool() or [new_lora(self.cram.modules, self.config.rank)] * len(BRANCHES)
        self.cram.set_experts(BRANCHES, pool, len(BRANCHES) - frozen_after(len(self._keys)))
        self._keys.begin()
        for gating in self._gatings.values():
            gating.begin()

    def extra_parameters(self) -> list[nn.Parameter]:
        """The keys."""
        return self._keys.trained

    def extra_loss(self, state: ForwardState) -> Tensor | None:
        """The key loss of the forward's samples."""
        query = None if state.route is None else state.route.query
        return None if query is None else self._keys.loss(query)

    def end_task(self) -> None:
        """Freeze the most used branches of every module and move them behind the frozen ones."""
        pool, tasks = self._pool(), len(self._keys)
        frozen = frozen_after(tasks)
        moved: list[dict[str, Factors]] = [{} for _ in BRANCHES]
        for path, gating in self._gatings.items():
            order = pool_order(gating.used, frozen, frozen_after(tasks + 1) - frozen)
            gating.finish(order)
            for index, source in enumerate(order):
                moved[index][path] = pool[source][path]
        self.cram.set_experts(BRANCHES, moved, 0)
        self._keys.finish()

    def route(self, query: Query | None, training: bool) -> Route:
        """The route's features are the samples' tasks [S, 1]: the one in training, else the most similar."""
        assert query is not None
        if training and self._keys.trained:
            tasks = torch.full((len(query),), len(self._keys), device=query.text.device)
        else:
            tasks = self._keys.nearest(query)
        gates = torch.ones(self.cram.num_layers, len(query), self.cram.num_experts)
        return Route(gates, query=query, features=tasks[:, None].float())

    def export_state(self) -> MethodState:
        """Routers of every module and keys."""
        routers = {f"{path}.routers": gating.routers().detach() for path, gating in self._gatings.items()}
        return MethodState({**routers, **self._keys.state()}, {})

    def import_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take up routers and keys, and share A in every module again."""
        tasks = len(tensors.get("keys.text", ()))
        check_state(
            tensors, {name: (tasks, *own.shape[1:]) for name, own in self.export_state().tensors.items()}
        )
        pool = self._pool()
        if len(pool) not in (0, len(BRANCHES)):
            raise ValueError(f"branches must be {len(BRANCHES)}, got {len(pool)} experts")
        first = {path: a for path, (a, _) in pool[0].items()} if pool else {}
        other = [path for each in pool for path in each if not torch.equal(each[path][0], first[path])]
        if other:
            raise ValueError(f"branches must share one A in every module, got others in {other[:8]}")
        self._keys.load(tensors)
        for path, gating in self._gatings.items():
            gating.finished = tensors[f"{path}.routers"].to(gating.finished, copy=True)
        if pool and not self.cram.shares_a:
            shared = [{path: (first[path], b) for path, (_, b) in each.items()} for each in pool]
            self.cram.set_experts(BRANCHES, shared, 0)

    def trained_values(self) -> int:
        """Values of routers and keys."""
        return sum(tensor.numel() for tensor in self.export_state().tensors.values())

    def _pool(self) -> list[dict[str, Factors]]:
        return [self.cram.expert_weights(index) for index in range(self.cram.num_experts)]
