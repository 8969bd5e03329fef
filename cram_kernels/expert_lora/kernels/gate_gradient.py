"""Gate gradient: dg[s, e] = scale * sum over the segment's tokens and the expert's rows of Z o V.

No division, so it is exact where a gate is 0. Two launches over data that is still in the L2 cache: sums over
the rows of each expert per token, then sums over the tokens of each segment in order. Sums are selected, not
multiplied by a mask, so NaN in one expert or segment stays there.

Bytes: 2 T R elements + 2 T E floats, small beside a pass over x (R << D).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cram_kernels.expert_lora.kernels.gating import Gating, tokens_per_gate
from cram_kernels.launch import Launch, cdiv, nbytes, power_of_two

# Both kernels stream a few megabytes: tiles of 4096 elements keep every value of a block in registers.
ELEMENTS, SUM_EXPERTS, WARPS = 4096, 16, 4


@triton.jit
def _finite_if_unused(value, gate):
    """Return `value`, made finite where the gate is exactly 0: an unused expert may hold NaN."""
    finite = tl.where(value != value, 0.0, tl.minimum(tl.maximum(value, -3.4028234e38), 3.4028234e38))
    return tl.where(gate == 0.0, finite, value)


@triton.jit(do_not_specialize=["tokens", "rank"])
def _token_dots(
    z,
    v,
    out,
    gating,
    tokens,
    rank,
    pitch,
    LAST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.arange(0, BLOCK_R)
    valid = rows < tokens
    offsets = rows.to(tl.int64)[:, None] * pitch + columns[None, :]
    stored = valid[:, None] & (columns < pitch)[None, :]
    products = tl.load(z + offsets, mask=stored, other=0.0).to(tl.float32)
    products *= tl.load(v + offsets, mask=stored, other=0.0).to(tl.float32)
    owners = tl.load(gating.owner[0] + columns, mask=columns < rank, other=-1)
    for expert in range(gating.experts):
        dots = tl.sum(tl.where((owners == expert)[None, :], products, 0.0), 1) * gating.scale
        place = rows.to(tl.int64) * gating.experts + expert
        if LAST:
            dots = _finite_if_unused(dots, tl.load(gating.gates + place, mask=valid, other=0.0))
        tl.store(out + place, dots, mask=valid)


@triton.jit(do_not_specialize=["tokens", "per_gate"])
def _segment_sums(
    dots,
    out,
    gating,
    tokens,
    per_gate,
    MAPPED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    segment = tl.program_id(0)
    experts = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    known = experts < gating.experts
    low, high = segment * per_gate, (segment + 1) * per_gate
    if MAPPED:
        low, high = 0, tokens
    acc = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for start in range(low, high, BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)
        mine = rows < high
        if MAPPED:
            mine &= tl.load(gating.segments + rows, mask=mine, other=-1) == segment
        place = rows.to(tl.int64)[:, None] * gating.experts + experts[None, :]
        acc += tl.load(dots + place, mask=mine[:, None] & known[None, :], other=0.0)
    place = segment.to(tl.int64) * gating.experts + experts
    gates = tl.load(gating.gates + place, mask=known, other=0.0)
    tl.store(out + place, _finite_if_unused(tl.sum(acc, 0), gates), mask=known)


def gate_gradient(z: Tensor, v: Tensor, out: Tensor, gating: Gating) -> list[Launch]:
    """Describe dg; one launch where every token has its own gates, else two.

    Args:
        z, v: [T, pitch].
        out: [S, E] float32.
        gating: Gates and one owner.
    """
    tokens, experts, rank = z.shape[0], gating.experts, gating.owner[0].shape[0]
    own = gating.segments is None and tokens_per_gate(tokens, gating.gates) == 1
    dots = out if own else out.new_empty(tokens, experts)
    block_r = power_of_two(z.shape[1])
    block_t = max(ELEMENTS // block_r, 1)
    launches = [
        Launch(
            kernel=_token_dots,
            grid=(cdiv(tokens, block_t) if experts else 0,),
            arguments={
                "z": z,
                "v": v,
                "out": dots,
                "gating": gating,
                "tokens": tokens,
                "rank": rank,
                "pitch": z.shape[1],
            },
            constants={"LAST": own, "BLOCK_T": block_t, "BLOCK_R": block_r},
            warps=WARPS,
            stages=1,
            moved_bytes=nbytes(z, v, dots),
        )
    ]
    if not own:
        launches.append(
            Launch(
                kernel=_segment_sums,
                grid=(out.shape[0], cdiv(experts, SUM_EXPERTS)),
                arguments={
                    "dots": dots,
                    "out": out,
                    "gating": gating,
                    "tokens": tokens,
                    "per_gate": tokens_per_gate(tokens, gating.gates),
                },
                constants={
                    "MAPPED": gating.segments is not None,
                    "BLOCK_T": ELEMENTS // SUM_EXPERTS,
                    "BLOCK_E": SUM_EXPERTS,
                },
                warps=WARPS,
                stages=1,
                moved_bytes=nbytes(dots, out),
            )
        )
    return launches
