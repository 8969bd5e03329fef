"""The gradients of the adapted linears' frozen weights, summed over training forwards by hooks.

    dL/dW0 = sum over tokens of dL/dy x^T                                                    [D_out, D_in]

The sums are float32 on the CPU, 4 bytes per adapted weight. They add up a step's forwards in all processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cram.methods.parts.task.sums import over_processes, own_part
from cram.model.linear import ExpertLinear
from cram.routing.means import without_autocast


class WeightGradients:
    """Sums of the weights' gradients while it is started.

    Attributes:
        sums: Module path -> [D_out, D_in].
    """

    def __init__(self, modules: Mapping[str, ExpertLinear]) -> None:
        """Nothing is gathered yet."""
        self._modules = modules
        self._handles: list[Any] = []
        self.sums: dict[str, Tensor] = {}

    @property
    def gathering(self) -> bool:
        """Whether the gradients of training forwards are added."""
        return bool(self._handles)

    def start(self, sums: Mapping[str, Tensor] | None = None) -> None:
        """Begin with zeros, or go on with the sums of a checkpoint."""
        self.stop()
        for path, module in self._modules.items():
            zeros = torch.zeros(module.out_features, module.in_features)
            self.sums[path] = zeros if sums is None else own_part(sums[path])
            self._handles.append(module.register_forward_hook(self._hook(path)))

    def stop(self) -> dict[str, Tensor]:
        """End; returns the sums over all processes."""
        for handle in self._handles:
            handle.remove()
        found = self.totals()
        self._handles, self.sums = [], {}
        return found

    def totals(self) -> dict[str, Tensor]:
        """Return the sums over all processes."""
        return over_processes(self.sums, next(iter(self._modules.values())).device)

    def _hook(self, path: str) -> Any:
        def forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad:
                x = inputs[0].detach().flatten(0, -2)
                output.register_hook(lambda gradient: self._add(path, gradient.flatten(0, -2), x))

        return forward

    def _add(self, path: str, gradient: Tensor, x: Tensor) -> None:
        if path in self.sums:
            with without_autocast(x.device):
                self.sums[path] += (gradient.float().mT @ x.float()).cpu()
