"""The public operations as functions of what they can be differentiated by."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from cram_kernels import (
    centroid_gates,
    expert_lora,
    orthogonality_penalty,
    routed_expert_lora,
    stacked_expert_lora,
)
from cram_kernels.testing import layer_inputs

NAMES = ("layer", "stacked", "routed", "gates", "penalty")
Operation = Callable[..., Tensor]


def _layer(name: str, impl: str, dropout: float, trained: int) -> tuple[Operation, list[Tensor]]:
    """A layer as a function of x and of the gates, or of the query and the centroids behind them."""
    inputs = layer_inputs(trained=trained)
    gates = inputs.gates.masked_fill(torch.arange(4) == 1, 0)  # the tangent of a gate passes at 0 too
    base, options = (inputs.weight, inputs.bias, inputs.experts()), {"dropout": dropout, "seed": 3}
    generator = torch.Generator().manual_seed(1)
    query, centroids = torch.randn(4, 6, generator=generator), torch.randn(4, 6, generator=generator)
    members = torch.arange(4)[:, None] != 2  # sample 2 has no member
    members = members.expand(4, 4)
    if name == "stacked":
        return lambda x, g: torch.cat(stacked_expert_lora(x, [base, base], g, impl=impl, **options)), [
            inputs.x,
            gates,
        ]
    if name == "routed":
        return lambda x, q, c: routed_expert_lora(x, *base, q, c, 3.0, members, impl=impl, **options), [
            inputs.x,
            query,
            centroids,
        ]
    if name == "gates":
        return lambda q, c: centroid_gates(q, c[None], 3.0, members, impl=impl), [query, centroids]
    return lambda x, g: expert_lora(x, *base, g, impl=impl, **options), [inputs.x, gates]


def _penalty(impl: str) -> tuple[Operation, list[Tensor]]:
    """The penalty of two modules as a function of a hidden state, both factors and gamma."""
    generator = torch.Generator().manual_seed(2)
    draw = partial(torch.randn, generator=generator)
    bases = [torch.linalg.qr(draw(7, 3))[0]] * 2

    def operation(hidden: Tensor, a: Tensor, bt: Tensor, gamma: Tensor) -> Tensor:
        return orthogonality_penalty([hidden] * 2, [a] * 2, [bt] * 2, bases, gamma, scale=2.0, impl=impl)

    return operation, [draw(4, 5), draw(2, 5), draw(2, 7), draw(2, 4)]


def made(name: str, impl: str, dropout: float = 0.0, trained: int = 0) -> tuple[Operation, list[Tensor]]:
    return _penalty(impl) if name == "penalty" else _layer(name, impl, dropout, trained)


def expected_tangent(name: str, place: int, dropout: float = 0.0, trained: int = 0) -> Tensor:
    """Of the direction of ones, as a quotient of the reference's values."""
    operation, inputs = made(name, "reference", dropout, trained)
    inputs = list(inputs)
    first = inputs[place]
    step = 1e-2
    ends = []
    for sign in (1, -1):
        inputs[place] = first + sign * step
        ends.append(operation(*inputs).double())
    return (ends[0] - ends[1]) / (2 * step)
