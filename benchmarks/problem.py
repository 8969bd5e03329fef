"""The data of one case: random tensors on the device, in so many sets that every call finds cold caches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.cases import DTYPES, GATE_OPS, GROUP_SIZE, QUERY_WIDTH, Case, model_named
from cram_kernels import PackedExperts, pack_experts

SCALE, SIGMA = 2.0, 2.0
# All sets of buffers together are this many times the last cache. A cyclic walk then finds nothing in the
# cache.
CACHE_FACTOR, MOST_BYTES = 4, 2 * 2**30


@dataclass(frozen=True)
class Problem:
    """Inputs of one call, named as in cram_kernels. The last expert is trained.

    Attributes:
        x, weight, bias, dy: [T, D_in], [D_out, D_in], [D_out] or None, and y's gradient.
        a, b: Experts in PEFT's shapes.
        gates: [S, E] float32.
        query, centroids: [S, D_q] and [L, E, D_q] float32. L is 1 for a linear.
        siblings: The other linears of a stack, on the same x and gates.
    """

    case: Case
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    dy: Tensor
    a: tuple[Tensor, ...]
    b: tuple[Tensor, ...]
    gates: Tensor
    query: Tensor
    centroids: Tensor
    siblings: tuple[Problem, ...] = ()

    @property
    def stack(self) -> tuple[Problem, ...]:
        """This linear and its siblings."""
        return (self, *self.siblings)

    @property
    def gradients(self) -> tuple[Tensor, ...]:
        """Gradient of each output."""
        return tuple(p.dy for p in self.stack)

    @cached_property
    def packed_a(self) -> Tensor:
        """A of all experts [R, D_in]."""
        return torch.cat(self.a)

    @cached_property
    def packed_bt(self) -> Tensor:
        """B of all experts, transposed, [R, D_out]."""
        return torch.cat([b.t() for b in self.b])

    @cached_property
    def owner(self) -> Tensor:
        """Expert of each packed row, [R]."""
        ranks = torch.tensor(self.case.ranks)
        return torch.repeat_interleave(torch.arange(len(ranks)), ranks).to(self.x.device)

    @property
    def trained_rank(self) -> int:
        """Number of packed rows that are trained."""
        return self.case.ranks[-1]

    def experts(self) -> PackedExperts:
        """Pack the experts. In training cases the last expert is trained."""
        return pack_experts(self.a, self.b, SCALE, trained=int(self.case.training))

    def route(self) -> tuple[Callable[[], Tensor], dict[str, Tensor]]:
        """Return a function that gives plain PyTorch baselines the gates [S, E], and the gates' leaves."""
        if self.case.op == "routed":
            return lambda: plain_gates(self.query, self.centroids)[0], {}
        gates = leaf(self.gates)
        return lambda: gates, {"gates": gates}

    def over_tokens(self, gates: Tensor) -> Tensor:
        """Spread gates [S, ...] over the tokens, [T, ...]."""
        times = self.case.tokens // self.case.segments
        return gates if times == 1 else gates.repeat_interleave(times, 0)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that a call works on."""
        tensors = (self.x, self.weight, self.dy, *self.a, *self.b, self.query, self.centroids)
        return sum(t.numel() * t.element_size() for t in tensors) + sum(p.nbytes for p in self.siblings)


@dataclass(frozen=True)
class Layer:
    """A candidate on one problem.

    Attributes:
        forward: Computes y (of a stack, each y) from the problem's tensors, which stay in place.
        leaves: What a training step differentiates by.
    """

    forward: Callable[[], Tensor | tuple[Tensor, ...]]
    leaves: Mapping[str, Tensor]


def leaf(tensor: Tensor) -> Tensor:
    """Return an alias that collects gradients, or the tensor itself if it already does."""
    return tensor if tensor.requires_grad else tensor.detach().requires_grad_()


def plain_gates(query: Tensor, centroids: Tensor) -> Tensor:
    """Gates [L, S, E] by the plain formula: distances, then softmax."""
    squared = torch.cdist(query.expand(len(centroids), -1, -1), centroids).square()
    return (-squared / (2 * SIGMA**2)).softmax(-1)


def make(case: Case, device: torch.device, seed: int = 0) -> Problem:
    """Draw the data of a case. Outputs have unit scale."""
    if len(case.projections) > 1:
        first, *others = (
            _draw(replace(case, projection=one), device, 1000 * seed + i)
            for i, one in enumerate(case.projections)
        )
        return replace(
            first, case=case, siblings=tuple(replace(p, x=first.x, gates=first.gates) for p in others)
        )
    return _draw(case, device, seed)


def _draw(case: Case, device: torch.device, seed: int) -> Problem:
    # Tensors without memory are not drawn.
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
    dtype, model = DTYPES[case.dtype], model_named(case.model)

    def draw(*shape: int, fan: int = 1, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype) / max(fan, 1) ** 0.5

    gates_only = case.op in GATE_OPS
    d_in, d_out, bias = (0, 0, False) if gates_only else model.linear(case.projection)
    tokens, experts, layers = case.tokens, len(case.ranks), model.layers if gates_only else 1
    gates = draw(case.segments, experts, dtype=torch.float32)
    if case.stream.endswith("-groups"):
        group = torch.arange(case.segments, device=device)[:, None] % -(-experts // GROUP_SIZE)
        gates = gates.masked_fill(
            torch.arange(experts, device=device)[None] // GROUP_SIZE != group, -torch.inf
        )
    return Problem(
        case=case,
        x=draw(0 if gates_only else tokens, d_in),
        weight=draw(d_out, d_in, fan=d_in),
        bias=draw(d_out) if bias else None,
        dy=draw(layers, tokens, experts, dtype=torch.float32) if gates_only else draw(tokens, d_out),
        a=tuple(draw(r, d_in, fan=d_in) for r in case.ranks),
        b=tuple(draw(d_out, r, fan=r) for r in case.ranks),
        gates=gates.softmax(-1),
        query=draw(case.segments, QUERY_WIDTH, fan=QUERY_WIDTH, dtype=torch.float32),
        centroids=draw(layers, experts, QUERY_WIDTH, fan=QUERY_WIDTH, dtype=torch.float32),
    )


def rotation(case: Case, device: torch.device, cache_bytes: int, most: int = 32) -> list[Problem]:
    """Return up to `most` sets of buffers that a cyclic walk finds cold in a cache of that size."""
    first = make(case, device)
    wanted = -(-CACHE_FACTOR * cache_bytes // max(first.nbytes, 1))
    count = max(1, min(wanted, most, MOST_BYTES // max(first.nbytes, 1)))
    return [first, *(make(case, device, seed) for seed in range(1, count))]


def smaller(case: Case, most_tokens: int) -> Case:
    """Return the case with at most `most_tokens`: as many tokens per segment as before, or one segment."""
    if case.tokens <= most_tokens:
        return case
    each = case.tokens // case.segments
    segments = max(most_tokens // each, 1)
    return replace(case, tokens=segments * min(each, most_tokens), segments=segments)
