"""The three products one by one: by the library's matmul, and by the package's kernels with a given tile.

"expand" adds U Bt to dy, which stands for y. "gram" makes dA from dZ, and then dBt from U. The package gates
in a launch of its own (FOLD), which is not timed here.
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
    """cuBLAS, or the CPU's library. Gating is a separate pass over [T, R]."""
    x, a, bt, dy = p.x, p.packed_a, p.packed_bt, p.dy
    if p.case.op == "shrink":
        return Layer(lambda: F.linear(x, a), {})
    w = (p.over_tokens(p.gates) * SCALE)[:, p.owner]
    z, v = F.linear(x, a), F.linear(dy, bt)
    if p.case.op == "expand":
        y = dy.clone()
        return Layer(lambda: y.addmm_((z * w).to(y.dtype), bt), {})
    tail = len(a) - p.trained_rank

    def gram() -> Tensor:
        dz, u = ((m[:, tail:] * w[:, tail:]).to(x.dtype) for m in (v, z))
        return torch.cat([(dz.t() @ x).flatten(), (u.t() @ dy).flatten()])

    return Layer(gram, {})


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


def _gating(p: Problem) -> Any:
    from cram_kernels.expert_lora.kernels.gating import gating

    return gating(p.gates, (p.owner,), None, SCALE)


def _padded(z: Tensor) -> Tensor:
    """Z or U in the kernels' layout [1, 1, T, pitch]."""
    return F.pad(z, (0, -z.shape[1] % 16)).view(1, 1, z.shape[0], -1)


def _gated(p: Problem, z: Tensor) -> Tensor:
    """Z o w, as FOLD leaves it for EXPAND and GRAM."""
    w = (p.over_tokens(p.gates) * SCALE)[:, p.owner]
    return _padded((z * w).to(z.dtype))


def _sequence(launches: list[Launch], out: Tensor) -> Layer:
    def forward() -> Tensor:
        for launch in launches:
            launch.run()
        return out

    return Layer(forward, {})


def _shrink(p: Problem, tile: Any) -> Layer:
    from cram_kernels.expert_lora.kernels.gram import reduce_planes
    from cram_kernels.expert_lora.kernels.shrink import shrink

    rank = len(p.packed_a)
    z = _padded(p.x.new_empty(p.case.tokens, rank))
    planes = z if tile.split_k == 1 else z.new_empty(tile.split_k, *z.shape[1:], dtype=torch.float32)
    launches = [shrink(p.x, (p.packed_a,), planes, _gating(p), tile)]
    if tile.split_k > 1:
        launches.append(reduce_planes(planes, z))
    return _sequence(launches, z[0, 0, :, :rank])


def _expand(p: Problem, tile: Any) -> Layer:
    from cram_kernels.expert_lora.kernels.expand import expand

    y, u = p.dy.clone(), _gated(p, F.linear(p.x, p.packed_a))
    return _sequence([expand(u, (p.packed_bt,), (y,), _gating(p), tile)], y)


def _gram(p: Problem, tile: Any) -> Layer:
    from cram_kernels.expert_lora.kernels.gram import gram, reduce_planes

    u, dz = (_gated(p, F.linear(*pair))[0, 0] for pair in ((p.x, p.packed_a), (p.dy, p.packed_bt)))
    elements = p.trained_rank * (p.x.shape[1] + p.dy.shape[1])
    planes = p.x.new_empty(tile.split_t, elements, dtype=torch.float32)
    flat = p.x.new_empty(elements)
    first = len(p.packed_a) - p.trained_rank
    return _sequence([gram((dz, u), (p.x, p.dy), planes, first, tile), reduce_planes(planes, flat)], flat)


# Repeated calls of expand add to the same y again and again. Values grow, but the work stays the same.
PARTS: dict[str, Callable[[Problem], Layer]] = {"matmul": matmul, "triton": triton_part}
