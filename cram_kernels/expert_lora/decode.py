"""Decoding on Triton kernels: T <= 64 without gradients, where the host's time is what counts.

    U_p = (X A_p^T) o w_p in planes, for every p in one launch    Y_p += U_p Bt_p, for every p in one launch

Where `tiles.STREAM` says so, the base products are part of the two launches (`kernels.stream`).

The second launch starts before the first has ended (sm_90); nothing stands between them. Both are kept for
later calls of the same kind (`plans`). Nothing here waits for the device or reads a tensor, so a CUDA graph
can capture it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cram_kernels import dispatch
from cram_kernels.expert_lora import plans, tiles
from cram_kernels.expert_lora.kernels.expand import expand
from cram_kernels.expert_lora.kernels.gating import Gating, gating, pitch_of
from cram_kernels.expert_lora.kernels.shrink import shrink
from cram_kernels.expert_lora.kernels.stream import join, stream
from cram_kernels.launch import Launch

# Up to here EXPAND adds the planes of a split SHRINK itself; beyond, FOLD does.
PLANES_TOKENS = 64
# From here on casting the float32 experts once, in a launch, costs less than casting their tiles everywhere.
CAST_TOKENS = 1024
# Rank tiles without a live gate can be left out only where R takes more than one.
SKIP_RANK = 128


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the base product; a bias without elements is none."""
    return F.linear(x, weight, bias if bias is not None and bias.shape[0] else None)


def starts_early(arch: int) -> bool:
    """Whether EXPAND may start before the SHRINK in front has ended."""
    return arch >= 90 and not dispatch.interpreted()


def new_planes(x: Tensor, split_k: int, stack: int, pitch: int) -> Tensor:
    """Return memory for what SHRINK writes: one plane in x's precision, or several in float32."""
    dtype = torch.float32 if split_k > 1 else x.dtype
    return torch.empty((split_k, stack, x.shape[0], pitch), dtype=dtype, device=x.device)


def operands(factors: Sequence[Tensor], x: Tensor) -> list[Tensor]:
    """Return the factors as the kernels should read them: cast in a launch of its own where that is cheaper.

    A stack's factors have one dtype.
    """
    dtypes = {factor.dtype for factor in factors}
    if x.shape[0] >= CAST_TOKENS or len(dtypes) > 1:
        factors = [factor.to(x.dtype) for factor in factors]
    return [factor.contiguous() for factor in factors]


def decode(
    x: Tensor,
    gates: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    bt: Sequence[Tensor],
    owners: Sequence[Tensor],
    segments: Tensor | None,
    scale: float,
    arch: int,
    *,
    bits: Tensor | None = None,
) -> list[Tensor]:
    """Return every Y_p [T, D_out_p]; T >= 1 and some projection has rows.

    Args:
        x: [T, D_in], elements of a row adjacent.
        gates: [S, E] float32.
        weights, biases: Base linears; None, or a bias without elements, is none.
        a, bt, owners: Packed factors and owners.
        segments: [T] or None.
        scale: Factor of every gate.
        arch: Architecture, see `cram_kernels.launch.architecture`.
        bits: Dropout mask on x, or None.
    """
    ys, tile, own = _bases(x, weights, biases, arch, streams=bits is None)
    inputs = (x, gates, segments, *a, *bt, *owners, *own)
    key = None
    if bits is None and plans.possible():
        key = (
            arch,
            tile,
            scale,
            x.device,
            x.shape,
            x.stride(0),
            x.dtype,
            gates.shape,
            gates.is_contiguous(),
            plans.segments_kind(segments),
            *[y.shape[1] for y in ys],
            *plans.factor_kinds((*a, *bt)),
            *plans.aligned((x, *owners, *own)),
        )
        plan = plans.find(key)
        if plan is not None:
            plan.run(inputs, ys, x.device)
            return ys
    gate = gating(gates, owners, segments, scale)
    if tile is None:
        memory, first, second = _described(x, a, bt, ys, gate, arch, bits)
    else:
        memory, first, second = _streamed(x, own, a, bt, ys, gate, tile, arch)
    if key is not None:
        plans.keep(key, (*inputs, *memory, *ys), memory, first, second)
    first.run()
    second.run()
    return ys


def _bases(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], arch: int, *, streams: bool
) -> tuple[list[Tensor], tiles.ShrinkTile | None, tuple[Tensor, ...]]:
    """Return every base product by the library; or, where the table says that the launches make them, memory
    for the results, the tile, and the weights and biases that the launches read."""
    tile = tiles.stream_tile(arch, x.dtype, *x.shape) if streams else None
    if tile is not None:
        given = [bias for bias in biases if bias is not None and bias.shape[0]]
        # Weights row by row; all with a bias or none.
        rows = all(weight.is_contiguous() and weight.dtype == x.dtype for weight in weights)
        if rows and len(given) in (0, len(weights)) and all(bias.is_contiguous() for bias in given):
            ys = [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]
            return ys, tile, (*weights, *given)
    return [linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)], None, ()


def _described(
    x: Tensor,
    a: Sequence[Tensor],
    bt: Sequence[Tensor],
    ys: Sequence[Tensor],
    gate: Gating,
    arch: int,
    bits: Tensor | None,
) -> tuple[list[Tensor], Launch, Launch]:
    """Return the planes of U and the two launches behind the base products."""
    # Casts and copies are launches: none may stand between SHRINK and the EXPAND that starts early.
    downs, ups = operands(a, x), operands(bt, x)
    pitch, early = pitch_of([down.shape[0] for down in downs]), starts_early(arch)
    tile = tiles.shrink_tile(arch, x.dtype, x.shape[0], pitch, x.shape[1])
    planes = new_planes(x, tile.split_k, len(downs), pitch)
    skip = pitch > SKIP_RANK
    first = shrink(x, downs, planes, gate, tile, bits=bits, skip=skip, gated=True, dependents=early)
    into = tiles.expand_tile(arch, x.dtype, x.shape[0])
    return [planes], first, expand(planes, ups, ys, gate, into, direct=True, dependent=early)


def _streamed(
    x: Tensor,
    own: Sequence[Tensor],
    a: Sequence[Tensor],
    bt: Sequence[Tensor],
    ys: Sequence[Tensor],
    gate: Gating,
    tile: tiles.ShrinkTile,
    arch: int,
) -> tuple[list[Tensor], Launch, Launch]:
    """Return the planes of U and of Y, and the two launches that make Y."""
    weights, biases = own[: len(ys)], own[len(ys) :]
    downs, ups = operands(a, x), operands(bt, x)
    shape, early = (tile.split_k, len(ys), x.shape[0]), starts_early(arch)
    pitch, most = pitch_of([down.shape[0] for down in downs]), max(y.shape[1] for y in ys)
    u, y = (torch.empty(*shape, width, dtype=torch.float32, device=x.device) for width in (pitch, most))
    first = stream(x, weights, downs, y, u, gate, tile, dependents=early)
    into = tiles.expand_tile(arch, x.dtype, x.shape[0])
    return [u, y], first, join(u, y, ups, ys, biases or None, into, dependent=early)
