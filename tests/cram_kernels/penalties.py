"""Inputs of orthogonality_penalty, one run of it, and its float64 oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cram_kernels import orthogonality_penalty, orthonormal_basis

# (D_in, D_out, r, k): equal and ragged widths, rank 0, no history, sizes around a vector's.
MIXED = (
    (12, 16, 4, 9),
    (12, 16, 9, 5),
    (17, 15, 1, 3),
    (12, 16, 0, 9),
    (16, 12, 6, 0),
    (64, 33, 5, 1),
    (100, 130, 13, 31),
)
GRADIENTS = ("hidden", "trained_a", "trained_b", "gamma")


@dataclass(frozen=True)
class Penalty:
    """Arguments of one call."""

    hidden: list[Tensor]
    trained_a: list[Tensor]
    trained_b: list[Tensor]
    bases: list[Tensor]
    gamma: list[Tensor]
    mask: Tensor | None = None
    scale: float = 2.0

    def map(self, change: Callable[[Tensor], Tensor]) -> Penalty:
        """The same call with every list's tensors changed, the mask moved along."""
        names = ("hidden", "trained_a", "trained_b", "bases", "gamma")
        lists = {name: [change(tensor) for tensor in getattr(self, name)] for name in names}
        return replace(self, **lists)

    def to(self, dtype: torch.dtype) -> Penalty:
        """The same call in another precision; gamma stays in float32 or better."""
        cast = self.map(lambda tensor: tensor.to(dtype))
        return replace(cast, gamma=[g.to(torch.promote_types(dtype, torch.float32)) for g in self.gamma])


def penalty_inputs(
    shapes: Sequence[tuple[int, int, int, int]] = MIXED, batch: int = 5, tokens: int = 0, seed: int = 0
) -> Penalty:
    """Draw one module per (D_in, D_out, r, k) in float64; with `tokens`, hidden [B, T, D_in] and a mask."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Penalty(
        hidden=[draw(batch, tokens, d_in) if tokens else draw(batch, d_in) for d_in, *_ in shapes],
        trained_a=[draw(rank, d_in) / d_in**0.5 for d_in, _, rank, _ in shapes],
        trained_b=[draw(rank, d_out) / max(rank, 1) ** 0.5 for _, d_out, rank, _ in shapes],
        bases=[orthonormal_basis(draw(d_out, width)) for _, d_out, _, width in shapes],
        gamma=[draw(batch).sigmoid() for _ in shapes],
        mask=torch.rand(batch, tokens, generator=generator) < 0.5 if tokens else None,
    )


def run_penalty(
    inputs: Penalty, function: Callable[..., Tensor], wanted: Sequence[str] = GRADIENTS
) -> dict[str, Tensor]:
    """The loss and the gradients of the wanted lists, each list's laid end to end; absent ones are zero."""
    leaves = inputs.map(lambda tensor: tensor.detach().clone(memory_format=torch.preserve_format))
    lists = {name: [t.requires_grad_() for t in getattr(leaves, name)] for name in wanted}
    loss = function(leaves)
    flat = [leaf for each in lists.values() for leaf in each]
    if loss.requires_grad:
        loss.backward()
    grads = iter([torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in flat])
    found = {f"d{n}": torch.cat([next(grads).flatten() for _ in each]) for n, each in lists.items()}
    return {"loss": loss.detach(), **found}


def run_impl(inputs: Penalty, impl: str, wanted: Sequence[str] = GRADIENTS) -> dict[str, Tensor]:
    """`run_penalty` on an implementation."""

    def call(p: Penalty) -> Tensor:
        lists = (p.hidden, p.trained_a, p.trained_b, p.bases, p.gamma)
        return orthogonality_penalty(*lists, scale=p.scale, mask=p.mask, impl=impl)

    return run_penalty(inputs, call, wanted)


def run_oracle(inputs: Penalty, wanted: Sequence[str] = GRADIENTS) -> dict[str, Tensor]:
    """`run_penalty` in float64, sample by sample with the dense product B A."""

    def energy(p: Penalty, m: int, b: int) -> Tensor:
        h = p.hidden[m][b]
        if p.mask is not None:
            h = h[p.mask[b]].sum(0) / p.mask[b].sum().clamp(min=1)
        dense = p.scale * (p.trained_b[m].t() @ p.trained_a[m])
        return p.gamma[m][b] * (p.bases[m].t() @ (dense @ h)).square().sum()

    def call(p: Penalty) -> Tensor:
        terms = [
            torch.stack([energy(p, m, b) for b in range(len(p.gamma[m]))]).mean()
            for m in range(len(p.bases))
            if p.bases[m].shape[1]
        ]
        return torch.stack(terms).mean() if terms else torch.zeros((), dtype=torch.float64)

    return run_penalty(inputs.map(torch.Tensor.double), call, wanted)
