"""The three products one by one: by the library's matmul, and by the package's kernels with a given tile.

shrink    U = (x A^T) o w, with w the gates times the scale
expand    y += U Bt, where dy stands for y
gram      dA from dZ = (dy B) o w, and dBt from U, one after another
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.problem import SCALE, Layer, Problem
from cram_kernels.launch import Launch, architecture


def matmul(p: Problem) -> Layer:
    """cuBLAS, or the CPU's library. Gating is a separate pass over [T, R], in "shrink"."""
    x, a, bt, dy = p.x, p.packed_a, p.packed_bt, p.dy
    if p.case.op == "shrink":
        w = _row_gates(p).to(x.dtype)
        return Layer(lambda: F.linear(x, a) * w, {})
    if p.case.op == "expand":
        u, y = _gated(p, x, a), dy.clone()
        return Layer(lambda: y.addmm_(u, bt), {})
    tail = len(a) - p.trained_rank
    dz, u = (_gated(p, *pair)[:, tail:].contiguous() for pair in ((dy, bt), (x, a)))
    return Layer(lambda: torch.cat([(dz.t() @ x).flatten(), (u.t() @ dy).flatten()]), {})


def triton_part(p: Problem, tile: Any = None) -> Layer:
    """The package's kernel. With `tile` None, the shipped tile."""
    return {"shrink": _shrink, "expand": _expand, "gram": _gram}[p.case.op](p, tile or shipped_tile(p))


def shipped_tile(p: Problem) -> Any:
    """Return the tile that the package's table gives."""
    from cram_kernels.expert_lora import tiles

    arch, dtype, tokens = architecture(p.x.device), p.x.dtype, p.case.tokens
    (d_out, d_in), rank = p.weight.shape, -(-len(p.packed_a) // 16) * 16
    return {
        "shrink": lambda: tiles.shrink_tile(arch, dtype, tokens, rank, d_in),
        "expand": lambda: tiles.expand_tile(arch, dtype, tokens),
        "gram": lambda: tiles.gram_tile(arch, dtype, tokens, d_in + d_out),
    }[p.case.op]()


def _row_gates(p: Problem) -> Tensor:
    """w [T, R]: the gate of each token for each packed row, times the scale."""
    return (p.over_tokens(p.gates) * SCALE)[:, p.owner]


def _gated(p: Problem, x: Tensor, factor: Tensor) -> Tensor:
    """(x F^T) o w in x's dtype."""
    return (F.linear(x, factor) * _row_gates(p)).to(x.dtype)


def _gating(p: Problem) -> Any:
    from cram_kernels.expert_lora.kernels.gating import gating

    return gating(p.gates, (p.owner,), None, SCALE)


def _padded(values: Tensor) -> Tensor:
    """[T, R] in the kernels' layout [T, pitch], 0 beyond R."""
    return F.pad(values, (0, -values.shape[1] % 16))


def _sequence(launches: list[Launch], out: Tensor) -> Layer:
    def forward() -> Tensor:
        for launch in launches:
            launch.run()
        return out

    return Layer(forward, {})


def _shrink(p: Problem, tile: Any) -> Layer:
    from cram_kernels.expert_lora.kernels.fold import fold
    from cram_kernels.expert_lora.kernels.shrink import shrink

    gate, rank, whole = _gating(p), len(p.packed_a), tile.split_k == 1
    u = torch.empty_like(_padded(p.x.new_empty(p.case.tokens, rank)))[None, None]
    planes = u if whole else u.new_empty(tile.split_k, *u.shape[1:], dtype=torch.float32)
    launches = [shrink(p.x, (p.packed_a,), planes, gate, tile, gated=whole)]
    if not whole:
        launches.append(fold(planes, None, u[0], gate, (rank,)))
    return _sequence(launches, u[0, 0, :, :rank])


def _expand(p: Problem, tile: Any) -> Layer:
    from cram_kernels.expert_lora.kernels.expand import expand

    y, u = p.dy.clone(), _padded(_gated(p, p.x, p.packed_a))[None, None]
    return _sequence([expand(u, (p.packed_bt,), (y,), _gating(p), tile)], y)


def _gram(p: Problem, tile: Any) -> Layer:
    from cram_kernels.expert_lora.kernels.gram import gram, reduce_planes

    u, dz = _padded(_gated(p, p.x, p.packed_a)), _padded(_gated(p, p.dy, p.packed_bt))
    elements = p.trained_rank * (p.x.shape[1] + p.dy.shape[1])
    planes = p.x.new_empty(tile.split_t, elements, dtype=torch.float32)
    flat, first = p.x.new_empty(elements), len(p.packed_a) - p.trained_rank
    return _sequence([gram((dz, u), (p.x, p.dy), planes, first, tile), reduce_planes(planes, flat)], flat)


# Repeated calls of expand add to the same y again and again. Values grow, but the work stays the same.
PARTS: dict[str, Callable[[Problem], Layer]] = {"matmul": matmul, "triton": triton_part}
