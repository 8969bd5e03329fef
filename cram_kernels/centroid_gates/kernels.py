"""Kernels of centroid_gates: all layers' gates in one launch, their gradients in one launch each.

Only differences between the logits of a sample's members matter. For any anchor p of that sample

    |v - c|^2 - |v - p|^2 = sum_d (c_d - p_d) (c_d + p_d - 2 v_d) = sum_d b_d (b_d - 2 (v_d - p_d)), b = c - p

and p is the member nearest to v, found by a first pass over direct differences. So no large term cancels:
neither |v|^2 and |c|^2 where norms are large, nor the common distance where v is far from all members,
nor the distance of a member so far away that its gate is 0. p belongs to the sample alone: its gates do
not depend, in any bit, on the other samples, and a centroid that is not finite reaches only the samples
that may use it.

    g[l, s, :] = softmax over the members of -|v_s - c_le|^2 / (2 sigma^2)      0 elsewhere by selection
    da[l, s, e] = g (dg - <g, dg>) / sigma^2                                    0 where g is 0, by selection
    dc[l, e] = sum_s da (v_s - c_le)         dv_s = sum_le da (c_le - v_s)

The sum of da over e is 0, so v could be left out of dv; with it the sum is over small differences. Rows
before the trained ones are written as zeros without being computed. Everything runs in float32 on the
ordinary cores, sums in a fixed order, nothing atomic. Saved for backward: the inputs and the gates.

Bytes: forward reads the centroids, L E D_q floats (the second pass finds them in the cache), and writes
L S E; backward of n trained rows reads L n D_q and writes L E D_q. FLOPs: forward 7 L S E D_q, none on
tensor cores, which would need the expanded form, whose terms cancel.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from cram_kernels.launch import Launch, cdiv, nbytes, power_of_two

# Most experts -> (BLOCK_S, BLOCK_D, warps). A program meets all experts of a layer, hence BLOCK_E is the
# bound itself, and holds BLOCK_S x BLOCK_E x BLOCK_D partial sums: 32 a thread (16 in the last row), so
# that they and their operands stay in registers. BLOCK_S: each centroid loaded serves so many samples,
# and L x S / BLOCK_S programs read a layer from the cache. BLOCK_D: at least 32, a memory transaction of
# 128 bytes, up to 128 experts. By arithmetic; compiled without spills, not timed on a GPU.
TILES = {8: (4, 128, 4), 16: (4, 64, 4), 32: (4, 64, 8), 64: (4, 32, 8), 128: (2, 32, 8), 256: (1, 16, 8)}
# Above the table: one sample, and the BLOCK_D that fills a 32-byte sector of memory.
BEYOND = (1, 8, 8)
# Steps whose rows are on their way together: a loop without tensor-core products is pipelined only on
# request, and each of its steps would wait for the memory.
STAGES: tl.constexpr = tl.constexpr(3)
# dcentroids: most rows a program takes, its samples at once times those rows, BLOCK_D, warps. A trained
# suffix is short (CRAM trains one centroid), so it is the programs along D_q and L that fill the machine.
GRADIENT_ROWS, GRADIENT_PAIRS, GRADIENT_BLOCK_D, GRADIENT_WARPS = 8, 16, 128, 4


@triton.jit
def _load_rows(base, rows, stride, d, inside, width):
    """Load rows [N, BLOCK_D] that lie `stride` elements apart, 0 outside."""
    offsets = rows.to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(base + offsets, mask=inside[:, None] & (d < width)[None, :], other=0.0)


@triton.jit
def _softmax(logits, allowed):
    """Softmax along the rows over the allowed columns; the others, and rows without any, are exactly 0."""
    highest = tl.max(tl.where(allowed, logits, float("-inf")), 1)
    powers = tl.where(allowed, tl.exp(tl.where(allowed, logits - highest[:, None], 0.0)), 0.0)
    total = tl.sum(powers, 1)
    gates = tl.div_rn(powers, tl.where(total == 0.0, 1.0, total)[:, None] + tl.zeros_like(powers))
    return tl.where(allowed, gates, 0.0)


@triton.jit
def _logit_gradient(gate, grad, mean, inverse):
    """Gradient of the logits over sigma^2; `grad` at a gate of 0 counts as 0, whatever it holds."""
    return tl.where(gate == 0.0, 0.0, gate * (grad - mean) * inverse)


@triton.jit
def _mean_gradient(gate, grad):
    """<g, dg> of each row."""
    return tl.sum(tl.where(gate == 0.0, 0.0, gate * grad), 1)


@triton.jit
def sample_gates(
    query,
    centroids,
    members,
    gates,
    scale,
    rows,
    segments,
    experts,
    width,
    query_stride,
    expert_stride,
    member_stride,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write one layer's gates [S, E] of the samples `rows`."""
    columns = tl.arange(0, BLOCK_E)
    here, known = rows < segments, columns < experts
    allowed = here[:, None] & known[None, :]
    if members is not None:
        places = members + rows.to(tl.int64)[:, None] * member_stride + columns[None, :]
        allowed &= tl.load(places, mask=allowed, other=0) != 0

    squares = tl.zeros((BLOCK_S, BLOCK_E, BLOCK_D), tl.float32)
    for start in tl.range(0, width, BLOCK_D, num_stages=STAGES):
        d = start + tl.arange(0, BLOCK_D)
        v = _load_rows(query, rows, query_stride, d, here, width)
        c = _load_rows(centroids, columns, expert_stride, d, known, width)
        difference = c[None, :, :] - v[:, None, :]
        squares += difference * difference
    anchors = tl.argmin(tl.where(allowed, tl.sum(squares, 2), float("inf")), 1)

    products = tl.zeros((BLOCK_S, BLOCK_E, BLOCK_D), tl.float32)
    for start in tl.range(0, width, BLOCK_D, num_stages=STAGES):
        d = start + tl.arange(0, BLOCK_D)
        v = _load_rows(query, rows, query_stride, d, here, width)
        c = _load_rows(centroids, columns, expert_stride, d, known, width)
        # NaN among the distances leaves the choice open: it may fall on padding.
        p = _load_rows(centroids, anchors, expert_stride, d, anchors < experts, width)
        beyond = c[None, :, :] - p[:, None, :]
        products += beyond * (beyond - 2.0 * (v - p)[:, None, :])
    found = _softmax(tl.sum(products, 2) * scale, allowed)

    places = rows.to(tl.int64)[:, None] * experts + columns[None, :]
    tl.store(gates + places, found, mask=here[:, None] & known[None, :])


@triton.jit(do_not_specialize=["segments", "experts"])
def _gates(
    query,
    centroids,
    members,
    gates,
    scale,
    segments,
    experts,
    width,
    query_stride,
    layer_stride,
    expert_stride,
    member_stride,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    layer = tl.program_id(1).to(tl.int64)
    sample_gates(
        query,
        centroids + layer * layer_stride,
        members,
        gates + layer * segments * experts,
        scale,
        tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S),
        segments,
        experts,
        width,
        query_stride,
        expert_stride,
        member_stride,
        BLOCK_S,
        BLOCK_E,
        BLOCK_D,
    )


@triton.jit(do_not_specialize=["segments", "experts", "first"])
def _centroid_gradient(
    grad,
    gates,
    query,
    centroids,
    out,
    inverse,
    segments,
    experts,
    first,
    width,
    query_stride,
    layer_stride,
    expert_stride,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    layer = tl.program_id(2).to(tl.int64)
    everyone = tl.arange(0, BLOCK_E)
    trained = (columns >= first) & (columns < experts)
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if (tl.program_id(1) + 1) * BLOCK_N > first:
        gates += layer * segments * experts
        grad += layer * segments * experts
        c = _load_rows(centroids + layer * layer_stride, columns, expert_stride, d, trained, width)
        for start in range(0, segments, BLOCK_S):
            rows = start + tl.arange(0, BLOCK_S)
            here = rows < segments
            g = _load_rows(gates, rows, experts, everyone, here, experts)
            mean = _mean_gradient(g, _load_rows(grad, rows, experts, everyone, here, experts))
            own = rows.to(tl.int64)[:, None] * experts + columns[None, :]
            own_gate = tl.load(gates + own, mask=here[:, None] & trained[None, :], other=0.0)
            own_grad = tl.load(grad + own, mask=here[:, None] & trained[None, :], other=0.0)
            da = _logit_gradient(own_gate, own_grad, mean[:, None], inverse)
            v = _load_rows(query, rows, query_stride, d, here, width)
            terms = da[:, :, None] * (v[:, None, :] - c[None, :, :])
            total += tl.sum(tl.where((own_gate != 0.0)[:, :, None], terms, 0.0), 0)
    places = (layer * experts + columns)[:, None] * width + d[None, :]
    tl.store(out + places, total, mask=(columns < experts)[:, None] & (d < width)[None, :])


@triton.jit(do_not_specialize=["layers", "segments", "experts"])
def _query_gradient(
    grad,
    gates,
    query,
    centroids,
    out,
    inverse,
    layers,
    segments,
    experts,
    width,
    query_stride,
    layer_stride,
    expert_stride,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    columns = tl.arange(0, BLOCK_E)
    here, known = rows < segments, columns < experts
    v = _load_rows(query, rows, query_stride, d, here, width)
    total = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    for _ in range(layers):
        g = _load_rows(gates, rows, experts, columns, here, experts)
        dg = _load_rows(grad, rows, experts, columns, here, experts)
        da = _logit_gradient(g, dg, _mean_gradient(g, dg)[:, None], inverse)
        c = _load_rows(centroids, columns, expert_stride, d, known, width)
        terms = da[:, :, None] * (c[None, :, :] - v[:, None, :])
        total += tl.sum(tl.where((g != 0.0)[:, :, None], terms, 0.0), 1)
        gates += segments * experts
        grad += segments * experts
        centroids += layer_stride
    places = rows.to(tl.int64)[:, None] * width + d[None, :]
    tl.store(out + places, total, mask=here[:, None] & (d < width)[None, :])


def tile_of(experts: int) -> tuple[int, int, int, int]:
    """Return BLOCK_S, BLOCK_E, BLOCK_D and warps for so many experts."""
    bound = next((bound for bound in TILES if experts <= bound), None)
    block_s, block_d, warps = BEYOND if bound is None else TILES[bound]
    return block_s, bound or power_of_two(experts), block_d, warps


def _sizes(query: Tensor, centroids: Tensor) -> dict[str, int]:
    """Return the kernels' arguments that describe the inputs, whose rows are contiguous."""
    return {
        "segments": query.shape[0],
        "experts": centroids.shape[1],
        "width": query.shape[1],
        "query_stride": query.stride(0),
        "layer_stride": centroids.stride(0),
        "expert_stride": centroids.stride(1),
    }


def forward_launch(
    query: Tensor, centroids: Tensor, sigma: float, members: Tensor | None, gates: Tensor
) -> Launch:
    """Describe the forward.

    Args:
        query: float32 [S, D_q]; rows of query, centroids and members are contiguous, their distance is free.
        centroids: float32 [L, E, D_q].
        sigma: Width.
        members: uint8 [S, E], 0 for others, or None.
        gates: float32 [L, S, E], contiguous; written.
    """
    layers, segments, experts = gates.shape
    block_s, block_e, block_d, warps = tile_of(experts)
    return Launch(
        kernel=_gates,
        grid=(cdiv(segments, block_s), layers if experts else 0),
        arguments={
            "query": query,
            "centroids": centroids,
            "members": members,
            "gates": gates,
            "scale": -0.5 / sigma**2,
            **_sizes(query, centroids),
            "member_stride": 0 if members is None else members.stride(0),
        },
        constants={"BLOCK_S": block_s, "BLOCK_E": block_e, "BLOCK_D": block_d},
        warps=warps,
        stages=1,
        cost=lambda: (nbytes(query, centroids, members, gates), 0),
        steps=cdiv(query.shape[1], block_d),
    )


def centroid_gradient_launch(
    grad: Tensor, gates: Tensor, query: Tensor, centroids: Tensor, sigma: float, trained: int, out: Tensor
) -> Launch:
    """Describe the gradient of the centroids.

    Args:
        grad, gates: float32 [L, S, E], contiguous.
        query, centroids, sigma: As in `forward_launch`.
        trained: The last so many experts get gradients.
        out: float32 [L, E, D_q], contiguous; written, rows of the other experts with zeros.
    """
    layers, experts, width = out.shape
    block_n = min(power_of_two(max(trained, 1)), GRADIENT_ROWS)
    needed = layers * trained * width * out.element_size()
    return Launch(
        kernel=_centroid_gradient,
        grid=(cdiv(width, GRADIENT_BLOCK_D), cdiv(experts, block_n), layers),
        arguments={
            "grad": grad,
            "gates": gates,
            "query": query,
            "centroids": centroids,
            "out": out,
            "inverse": 1 / sigma**2,
            "first": experts - trained,
            **_sizes(query, centroids),
        },
        constants={
            "BLOCK_S": GRADIENT_PAIRS // block_n,
            "BLOCK_E": tile_of(experts)[1],
            "BLOCK_N": block_n,
            "BLOCK_D": GRADIENT_BLOCK_D,
        },
        warps=GRADIENT_WARPS,
        stages=1,
        cost=lambda: (nbytes(grad, gates, query, out) + needed, 0),
        steps=cdiv(query.shape[0], GRADIENT_PAIRS // block_n),
    )


def query_gradient_launch(
    grad: Tensor, gates: Tensor, query: Tensor, centroids: Tensor, sigma: float, out: Tensor
) -> Launch:
    """Describe the gradient of the query.

    Args:
        grad, gates, query, centroids, sigma: As in `centroid_gradient_launch`.
        out: float32 [S, D_q], contiguous; written.
    """
    block_s, block_e, block_d, warps = tile_of(centroids.shape[1])
    segments, width = out.shape
    return Launch(
        kernel=_query_gradient,
        grid=(cdiv(segments, block_s), cdiv(width, block_d)),
        arguments={
            "grad": grad,
            "gates": gates,
            "query": query,
            "centroids": centroids,
            "out": out,
            "inverse": 1 / sigma**2,
            "layers": centroids.shape[0],
            **_sizes(query, centroids),
        },
        constants={"BLOCK_S": block_s, "BLOCK_E": block_e, "BLOCK_D": block_d},
        warps=warps,
        stages=1,
        cost=lambda: (nbytes(grad, gates, query, centroids, out), 0),
        steps=centroids.shape[0],
    )


def launches(
    layers: int, segments: int, experts: int, width: int, trained: int, *, masked: bool, device: str = "meta"
) -> Iterator[Launch]:
    """Describe every launch of a forward and a backward of these sizes on new tensors; `masked`: members."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    query, centroids = empty(segments, width), empty(layers, experts, width)
    gates = empty(layers, segments, experts)
    members = empty(segments, experts, dtype=torch.uint8) if masked else None
    yield forward_launch(query, centroids, 1.0, members, gates)
    grads = (torch.empty_like(gates), gates, query, centroids, 1.0)
    yield centroid_gradient_launch(*grads, trained, torch.empty_like(centroids))
    yield query_gradient_launch(*grads, torch.empty_like(query))
