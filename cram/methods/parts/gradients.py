"""The gradients of the adapted linears' frozen weights, summed over training forwards by hooks.

    dL/dW0 = sum over tokens of dL/dy x^T                                                    [D_out, D_in]

The sums are float32 on the CPU, 4 bytes per adapted weight. They add up a step's forwards in all processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cram.model.linear import ExpertLinear


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
        """Begin with zeros, or go on with earlier sums."""
        self.stop()
        for path, module in self._modules.items():
            zeros = torch.zeros(module.out_features, module.in_features)
            self.sums[path] = zeros if sums is None else sums[path].clone()
            self._handles.append(module.register_forward_hook(self._hook(path)))

    def stop(self) -> dict[str, Tensor]:
        """End; returns the sums over all processes."""
        for handle in self._handles:
            handle.remove()
        found, self._handles, self.sums = self.sums, [], {}
        if found and dist.is_available() and dist.is_initialized():
            device = next(iter(self._modules.values())).device
            found = {path: _summed(sums.to(device)).cpu() for path, sums in found.items()}
        return found

    def _hook(self, path: str) -> Any:
        def forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad:
                x = inputs[0].detach().flatten(0, -2)
                output.register_hook(lambda gradient: self._add(path, gradient.flatten(0, -2), x))

        return forward

    def _add(self, path: str, gradient: Tensor, x: Tensor) -> None:
        if path in self.sums:
            self.sums[path] += (gradient.float().mT @ x.float()).cpu()


def _summed(tensor: Tensor) -> Tensor:
    dist.all_reduce(tensor)
    return tensor
