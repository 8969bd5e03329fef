"""ROUTED SHRINK: Z = drop(X) A^T and the segments' gates in one launch.

SHRINK does not need the gates (FOLD or EXPAND applies them), so the distances to the centroids and their
softmax are programs of the same launch, beside those of SHRINK and at the same time: routing adds no launch
and no pass. The programs that route follow those that shrink along the first axis; each takes BLOCK_S
segments and writes their rows of gates [S, E]. Whatever reads Z reads the gates after this launch.

Bytes: SHRINK's, and S D_q + E D_q + S E floats.  FLOPs on tensor cores: SHRINK's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from cram_kernels.centroid_gates.kernels import sample_gates, tile_of
from cram_kernels.expert_lora.kernels.shrink import block_constants, shrink_block, store_block
from cram_kernels.expert_lora.tiles import ShrinkTile
from cram_kernels.launch import Launch, cdiv, nbytes


class Router(NamedTuple):
    """Kernel argument: query float32 [S, D_q], centroids float32 [E, D_q], members uint8 [S, E] or None.

    Elements of a row are adjacent.
    """

    query: Any
    centroids: Any
    members: Any


class Routing(NamedTuple):
    """Kernel argument: factor of squared distances, D_q, elements between rows of the router's tensors."""

    scale: Any
    width: Any
    query_stride: Any
    expert_stride: Any
    member_stride: Any


def routing(router: Router, sigma: float) -> Routing:
    """Return the kernel's view of how distances become gates."""
    strides = [0 if tensor is None else tensor.stride(0) for tensor in router]
    return Routing(-0.5 / sigma**2, router.query.shape[1], *strides)


@triton.jit(do_not_specialize=["tokens", "segments", "experts", "rank"])
def _routed_shrink(
    x,  # [T, width], rows x_stride elements apart
    factor,  # [rank, width]
    z,  # [SPLIT_K, 1, T, pitch], written
    gates,  # float32 [S, E], written
    router,
    routing,
    bits,  # the dropout mask on x, uint8 [T, bits_pitch], or None
    tokens,
    segments,
    experts,
    width,
    x_stride,
    rank,
    pitch,
    bits_pitch,
    SPLIT_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    DEPENDENTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    if DEPENDENTS:
        gdc_launch_dependents()
    tiles = tl.cdiv(pitch, BLOCK_R)
    if tl.program_id(0) < tiles:
        rows = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
        columns = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
        acc = shrink_block(
            x,
            factor,
            bits,
            tokens,
            width,
            x_stride,
            bits_pitch,
            rank,
            rows,
            columns,
            SPLIT_K,
            BLOCK_T,
            BLOCK_R,
            BLOCK_K,
            EVEN_K,
        )
        store_block(z, acc, tl.program_id(2), tokens, pitch, rows, columns)
    else:
        layer = (tl.program_id(0) - tiles) * tl.num_programs(1) + tl.program_id(1)
        first = (layer * tl.num_programs(2) + tl.program_id(2)) * BLOCK_S
        sample_gates(
            router.query,
            router.centroids,
            router.members,
            gates,
            routing.scale,
            first + tl.arange(0, BLOCK_S),
            segments,
            experts,
            routing.width,
            routing.query_stride,
            routing.expert_stride,
            routing.member_stride,
            BLOCK_S,
            BLOCK_E,
            BLOCK_Q,
        )


def routed_shrink(
    x: Tensor,
    factor: Tensor,
    z: Tensor,
    gates: Tensor,
    router: Router,
    sigma: float,
    tile: ShrinkTile,
    *,
    bits: Tensor | None = None,
    dependents: bool = False,
) -> Launch:
    """Describe Z = drop(X) A^T and gates = softmax of the distances.

    Args:
        x, z, tile, bits, dependents: As in `shrink`, for one projection.
        factor: A [R, D_in], contiguous; x's dtype or float32.
        gates: float32 [S, E], contiguous; written.
        router: Query, centroids and members.
        sigma: Width of the distance kernel.
    """
    tokens, width = x.shape
    split_k, _, _, pitch = z.shape
    block = block_constants(z, tile, width)
    block_s, block_e, block_q, _ = tile_of(gates.shape[1])
    blocks = cdiv(tokens, tile.block_t)
    routers = cdiv(cdiv(gates.shape[0], block_s), blocks * split_k)
    return Launch(
        kernel=_routed_shrink,
        grid=(cdiv(pitch, block["BLOCK_R"]) + routers, blocks, split_k),
        arguments={
            "x": x,
            "factor": factor,
            "z": z,
            "gates": gates,
            "router": router,
            "routing": routing(router, sigma),
            "bits": bits,
            "tokens": tokens,
            "segments": gates.shape[0],
            "experts": gates.shape[1],
            "width": width,
            "x_stride": x.stride(0),
            "rank": factor.shape[0],
            "pitch": pitch,
            "bits_pitch": 0 if bits is None else bits.shape[1],
        },
        constants={
            **block,
            "DEPENDENTS": dependents,
            "BLOCK_S": block_s,
            "BLOCK_E": block_e,
            "BLOCK_Q": block_q,
        },
        warps=tile.warps,
        stages=tile.stages,
        cost=lambda: (nbytes(x, factor, z, bits, *router, gates), 2 * tokens * factor.numel()),
        steps=cdiv(cdiv(width, tile.block_k), split_k),
    )
