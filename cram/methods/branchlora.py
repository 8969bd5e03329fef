"""BranchLoRA (arXiv 2506.02041): one A, eight branches B_i, one router and two frozen branches per task.

    y = W0 x + b + sum_i g_i scale B_i A dropout(x)        g = softmax over the two largest of W_t x_1
    loss = cross-entropy + key loss (`parts.task.keys`)

x_1 is the first real token of the module's input. Each task has its own routers W_t and its own keys. At test
time the keys decide a sample's task: it is the task whose keys are most similar to the sample's features. The
routers of that task act.

Faithful to the paper:
* A is shared and always trained.
* A router reads the first token and chooses two branches.
* Every task has its own routers and keys. The key loss has weight 1.
* The task is chosen by the sum of the image similarity and the text similarity.

Own reading of what is not public:
* The features are CLIP's.
* The key loss is a mean over samples, so it does not depend on the batch size.
* The use of a branch is its summed gate over the task's training.
* A task freezes the two most used of a module's trained branches. Two branches always stay trainable.
* Routers start with the initial values of `nn.Linear`. `rank` is the rank of A.

With causal attention the state of the first token depends on no other token. So if all prompts of a task
begin alike, the task's router gives all its samples the same branches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cram.methods.base import Method, MethodState, check_state
from cram.methods.parts.task.keys import TaskKeys
from cram.methods.parts.task.routers import TaskRouters
from cram.model.attached import AttachedModel
from cram.model.factors import Factors, new_lora
from cram.model.state import ForwardState
from cram.routing.query import Query, Route

BRANCHES = tuple(f"branch{index}" for index in range(8))
TOP = FROZEN_A_TASK = 2


def frozen_after(tasks: int) -> int:
    """Return the number of frozen branches after `tasks` tasks."""
    return min(FROZEN_A_TASK * tasks, len(BRANCHES) - FROZEN_A_TASK)


def pool_order(used: Tensor, frozen: int, freeze: int) -> list[int]:
    """Order branches by their use [E]: the `frozen` ones, then the `freeze` most used, then the rest."""
    trained = range(frozen, len(used))
    new = sorted(trained, key=lambda index: -float(used[index]))[:freeze]
    return [*range(frozen), *new, *(index for index in trained if index not in new)]


class BranchLoraMethod(Method):
    """A pool of branches in every module. The frozen branches come first."""

    name = "branchlora"
    pool = BRANCHES
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
        """Train A and the branches that are not frozen, with a new router and new keys."""
        pool = self._pool() or [new_lora(self.cram.modules, self.config.rank)] * len(BRANCHES)
        self.cram.set_experts(BRANCHES, pool, len(BRANCHES) - frozen_after(len(self._keys)))
        self._keys.begin()
        for gating in self._gatings.values():
            gating.begin()

    def extra_parameters(self) -> list[nn.Parameter]:
        """Return the keys in training."""
        return self._keys.trained

    def extra_loss(self, state: ForwardState) -> Tensor | None:
        """Return the key loss of the forward's samples."""
        query = None if state.route is None else state.route.query
        return None if query is None else self._keys.loss(query)

    def end_task(self) -> None:
        """Freeze the most used branches of every module and move them behind the frozen ones."""
        pool, tasks = self._pool(), len(self._keys)
        frozen = frozen_after(tasks)
        moved: list[dict[str, Factors]] = [{} for _ in BRANCHES]
        for path, gating in self._gatings.items():
            order = pool_order(gating.use(), frozen, frozen_after(tasks + 1) - frozen)
            gating.finish(order)
            for index, source in enumerate(order):
                moved[index][path] = pool[source][path]
        self.cram.set_experts(BRANCHES, moved, 0)
        self._keys.finish()

    def route(self, query: Query | None, training: bool) -> Route:
        """Return gates 1, with each sample's task [S, 1] as the route's features.

        While a task is trained, it is the task of every sample. Otherwise the most similar keys decide.
        """
        assert query is not None
        if training and self._keys.trained:
            tasks = torch.full((len(query),), len(self._keys), device=query.text.device)
        else:
            tasks = self._keys.nearest(query)
        gates = torch.ones(self.cram.num_layers, len(query), self.cram.num_experts)
        return Route(gates, query=query, features=tasks[:, None].float())

    def export_state(self) -> MethodState:
        """Return the routers of every module and the keys."""
        routers = {f"{path}.routers": gating.routers().detach() for path, gating in self._gatings.items()}
        return MethodState({**routers, **self._keys.state()}, {})

    def import_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take up routers and keys, and share one A between the branches of every module again."""
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
        """Return the number of values of routers and keys."""
        return sum(tensor.numel() for tensor in self.export_state().tensors.values())

    def _pool(self) -> list[dict[str, Factors]]:
        return [self.cram.expert_weights(index) for index in range(self.cram.num_experts)]
