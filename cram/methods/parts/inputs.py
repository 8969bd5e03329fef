"""Merging low-rank updates by what they do to the inputs of each task: regression as in continual learning.

The merged weight of tasks 1 .. t is the minimiser of

    sum_i E ||(W - B_i A_i) x_i||^2 + rho ||W||_F^2        x_i: inputs of the linear while task i is trained

With S_i = E[x_i x_i^T] [D_in, D_in] it is W = (sum_i B_i A_i S_i) (sum_i S_i + rho I)^-1. So the merged
weight is one expert again: its b are the B_i side by side, and its a are the rows A_i S_i times that inverse.

S_i is gathered while task i is trained, over real tokens: products in float32, sums in float64 on the CPU, 8
bytes per entry. q, k and v read the same input and share one S. Kept between tasks are sum_i S_i and the rows
A_i S_i in float32: 4 D_in^2 bytes per input and 4 r D_in per task and linear. A model of 32 layers and width
4096 with experts in q, k, v and o needs 8.6 GB for the sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cram.methods.parts.task.sums import over_processes, own_part
from cram.model.factors import Factors
from cram.model.linear import ExpertLinear
from cram.model.stack import SHARED_INPUT
from cram.routing.means import without_autocast

RIDGE = 1e-4  # rho, as a share of the mean eigenvalue of sum_i S_i
TOTAL, READ, SUM, COUNT = "inputs.", "read.", "moments.", "tokens"


class InputRegression:
    """The inputs' second moments of one model's adapted linears, and the merge that follows from them.

    Attributes:
        sources: Module path -> path of the module whose input it shares.
        totals: Source path -> sum over the tasks of S_i [D_in, D_in], float32.
        rows: Module path -> A_i S_i of all tasks, one below the other [sum of r_i, D_in], float32.
        sums: Source path -> sum of x x^T over the tokens of the task in training, float64.
        tokens: How many tokens were summed.
    """

    def __init__(self, modules: Mapping[str, ExpertLinear]) -> None:
        """Nothing is gathered yet."""
        self._modules = modules
        self._handles: list[Any] = []
        self.sources = {path: source_of(path, modules) for path in modules}
        self.totals: dict[str, Tensor] = {}
        self.rows: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        self.tokens = 0

    def begin_task(self) -> None:
        """Start to gather from zero."""
        self.release()
        self.tokens = 0
        for path in sorted(set(self.sources.values())):
            module = self._modules[path]
            self.sums[path] = torch.zeros(module.in_features, module.in_features, dtype=torch.float64)
            counts = not len(self._handles)
            self._handles.append(module.register_forward_pre_hook(self._hook(path, counts)))

    def end_task(self, newest: Mapping[str, Factors]) -> None:
        """Stop to gather. Keep the task's moments, and what its factors a [r, D_in] read of them.

        Raises:
            ValueError: If no training forward was seen.
        """
        gathered = self._gathered()
        tokens, paths = int(gathered[COUNT]), list(self.sums)
        self.release()
        if not tokens:
            raise ValueError("a merge by inputs must follow at least one training forward, got none")
        moments = {path: (gathered[SUM + path] / tokens).float() for path in paths}
        for path, (a, _) in newest.items():
            read = (a.double().cpu() @ moments[self.sources[path]].double()).float()
            self.rows[path] = torch.cat([self.rows[path], read]) if path in self.rows else read
        for path, moment in moments.items():
            self.totals[path] = self.totals[path] + moment if path in self.totals else moment

    def merged(self, path: str, factors: list[Factors]) -> Factors:
        """Return a [sum of r_i, D_in] and b [D_out, sum of r_i] of the merged weight, float64 on the CPU.

        Args:
            path: The module.
            factors: (a_i, b_i) of all its experts; their order is that of the tasks.
        """
        total = self.totals[self.sources[path]].double()
        ridge = RIDGE * total.diagonal().mean()
        regular = total + ridge * torch.eye(len(total), dtype=total.dtype)
        a = torch.linalg.solve(regular, self.rows[path].double().mT).mT
        return a, torch.cat([b.double().cpu() for _, b in factors], 1)

    def release(self) -> None:
        """Stop to gather, and forget what the task in training has gathered."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.sums = [], {}

    def state(self) -> dict[str, Tensor]:
        """Return what is kept between tasks, as "inputs.<source>" and "read.<path>"."""
        found = {TOTAL + path: total for path, total in self.totals.items()}
        return found | {READ + path: rows for path, rows in self.rows.items()}

    def shapes(self, ranks: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of the state for experts with `ranks` rows in all, by module path."""
        if not any(ranks.values()):
            return {}
        widths = {path: module.in_features for path, module in self._modules.items()}
        found: dict[str, tuple[int, ...]] = {
            TOTAL + path: (widths[path], widths[path]) for path in set(self.sources.values())
        }
        return found | {READ + path: (rank, widths[path]) for path, rank in ranks.items()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up a state of the right shapes."""
        named = tensors.items()
        self.totals = {n.removeprefix(TOTAL): t.clone() for n, t in named if n.startswith(TOTAL)}
        self.rows = {n.removeprefix(READ): t.clone() for n, t in named if n.startswith(READ)}

    def training_state(self) -> dict[str, Tensor]:
        """Return what the task has gathered in all processes so far, as "moments.<source>" and "tokens"."""
        return {name: total.clone() for name, total in self._gathered().items()}

    def load_training(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up a training state after `begin_task`."""
        self.tokens = int(own_part(tensors[COUNT]))
        for path, total in self.sums.items():
            total.copy_(own_part(tensors[SUM + path]))

    def _gathered(self) -> dict[str, Tensor]:
        own = {COUNT: torch.tensor([self.tokens])}
        own |= {SUM + path: total for path, total in self.sums.items()}
        return over_processes(own, next(iter(self._modules.values())).device)

    def _hook(self, path: str, counts: bool) -> Any:
        def gather(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if not (module.training and torch.is_grad_enabled()):
                return
            state = self._modules[path].current.state
            if not state.counts(path):
                return
            mask = state.mask
            x = inputs[0].detach().float()
            x = x.flatten(0, -2) if mask is None else x[mask.to(x.device)]
            with without_autocast(x.device):
                self.sums[path] += (x.mT @ x).to("cpu", torch.float64)
            self.tokens += len(x) if counts else 0

        return gather


def source_of(path: str, modules: Mapping[str, Any]) -> str:
    """Return the path of the first module that reads the same input as the module at `path`."""
    parent, _, name = path.rpartition(".")
    shared = next((names for names in SHARED_INPUT if name in names), (name,))
    paths = [f"{parent}.{other}" if parent else other for other in shared]
    return next((other for other in paths if other in modules), path)
