"""Decoding with routing on Triton kernels: `decode` for one linear whose gates its first launch computes.

    U = X A^T in planes, and g = softmax of distances, in one launch    Y += ((sum of U) o w) Bt

As in `decode`, the second launch starts before the first has ended (sm_90), both are kept for later calls of
the same kind, and a CUDA graph can capture them.
"""

from __future__ import annotations

from torch import Tensor

from cram_kernels.expert_lora import plans, tiles
from cram_kernels.expert_lora.decode import linear, new_planes, operands, starts_early
from cram_kernels.expert_lora.kernels.expand import expand
from cram_kernels.expert_lora.kernels.gating import gating, pitch_of
from cram_kernels.expert_lora.kernels.routed_shrink import Router, routed_shrink
from cram_kernels.launch import Launch


def new_gates(router: Router) -> Tensor:
    """Return memory for the gates [S, E]."""
    gates: Tensor = router.query.new_empty(router.query.shape[0], router.centroids.shape[0])
    return gates


def routed_decode(
    x: Tensor,
    router: Router,
    segments: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    bt: Tensor,
    owner: Tensor,
    sigma: float,
    scale: float,
    arch: int,
    *,
    bits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return Y [T, D_out] and the gates [S, E]; T >= 1 and R >= 1.

    Args:
        x: [T, D_in], elements of a row adjacent.
        router: Query [S, D_q], centroids [E, D_q] and members [S, E], contiguous.
        segments: [T] or None.
        weight, bias: Base linear.
        a, bt, owner: Packed factors and owners.
        sigma: Width of the distance kernel.
        scale: Factor of every gate.
        arch: Architecture, see `cram_kernels.launch.architecture`.
        bits: Dropout mask on x, or None.
    """
    y = linear(x, weight, bias)
    inputs = (x, *router, segments, a, bt, owner)
    key = None
    if bits is None and plans.possible():
        key = (
            arch,
            sigma,
            scale,
            x.device,
            x.shape,
            x.stride(0),
            x.dtype,
            router.query.shape,
            router.centroids.shape[0],
            plans.segments_kind(segments),
            y.shape[1],
            *plans.factor_kinds((a, bt)),
            *plans.aligned((x, *router, owner)),
        )
        plan = plans.find(key)
        if plan is not None:
            _, gates = plan.run(inputs, (y,), x.device)
            return y, gates
    memory, first, second = _described(x, router, segments, a, bt, owner, sigma, scale, arch, bits, y)
    if key is not None:
        plans.keep(key, (*inputs, *memory, y), memory, first, second)
    first.run()
    second.run()
    return y, memory[1]


def _described(
    x: Tensor,
    router: Router,
    segments: Tensor | None,
    a: Tensor,
    bt: Tensor,
    owner: Tensor,
    sigma: float,
    scale: float,
    arch: int,
    bits: Tensor | None,
    y: Tensor,
) -> tuple[list[Tensor], Launch, Launch]:
    """Return the planes of Z and the gates, and the two launches behind the base product."""
    # Casts and copies are launches: none may stand between SHRINK and the EXPAND that starts early.
    (down,), ups = operands([a], x), operands([bt], x)
    pitch, early = pitch_of([a.shape[0]]), starts_early(arch)
    tile = tiles.shrink_tile(arch, x.dtype, x.shape[0], pitch, x.shape[1])
    planes = new_planes(x, tile.split_k, 1, pitch)
    gates = new_gates(router)
    first = routed_shrink(x, down, planes, gates, router, sigma, tile, bits=bits, dependents=early)
    gate = gating(gates, (owner,), segments, scale)
    into = tiles.expand_tile(arch, x.dtype, x.shape[0])
    second = expand(planes, ups, [y], gate, into, direct=True, dependent=early, gated=True)
    return [planes, gates], first, second
