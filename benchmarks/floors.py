"""The least time of a case on this hardware: bytes and FLOPs of its phases, from the shapes.

A phase reads each input once and writes each output once; its floor is the longer of bytes / copy bandwidth
and FLOPs / matmul rate, both measured on the machine. A case's floor is the sum over its phases, which run
one after another. The floor counts EXPAND as a pass of its own that reads and writes y. A base product with
EXPAND fused into it could go below the floor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.cases import DTYPES, GATE_OPS, QUERY_WIDTH, Case, model_named


@dataclass(frozen=True)
class Phase:
    """A part of the work. The next phase begins after it has ended."""

    name: str
    moved_bytes: float
    flops: float


@dataclass(frozen=True)
class Ceilings:
    """Measured rates per microsecond: copied bytes (read and written), and matmul FLOPs by dtype."""

    bytes_per_us: float
    flops_per_us: dict[str, float]

    def floor_us(self, phases: list[Phase], dtype: str) -> float:
        """Return the least time of the phases one after another."""
        rate = self.flops_per_us[dtype]
        return sum(max(p.moved_bytes / self.bytes_per_us, p.flops / rate) for p in phases)


def base_phases(case: Case) -> list[Phase]:
    """The frozen linear, or each linear of a stack: forward, and dX in training."""
    if len(case.projections) > 1:
        return [phase for one in case.projections for phase in base_phases(replace(case, projection=one))]
    d_in, d_out, _ = model_named(case.model).linear(case.projection)
    t, e = case.tokens, DTYPES[case.dtype].itemsize
    once = Phase("base", e * (t * d_in + d_in * d_out + t * d_out), 2 * t * d_in * d_out)
    return [once, Phase("base dX", once.moved_bytes, once.flops)] if case.training else [once]


def expert_phases(case: Case) -> list[Phase]:
    """The experts: SHRINK and EXPAND. In training also V, GRAM of the last expert, and EXPAND into dX."""
    if len(case.projections) > 1:
        return [phase for one in case.projections for phase in expert_phases(replace(case, projection=one))]
    d_in, d_out, _ = model_named(case.model).linear(case.projection)
    t, e, rank, last = case.tokens, DTYPES[case.dtype].itemsize, sum(case.ranks), case.ranks[-1]
    parts = {
        "shrink": Phase("shrink", e * (t * d_in + rank * d_in + t * rank), 2 * t * rank * d_in),
        "expand": Phase("expand", e * (2 * t * d_out + rank * d_out + t * rank), 2 * t * rank * d_out),
        "gram": Phase(
            "gram", e * (t + last) * (d_in + d_out) + 2 * e * t * last, 2 * t * last * (d_in + d_out)
        ),
    }
    if case.op in parts:
        return [parts[case.op]]
    forward = [parts["shrink"], parts["expand"]]
    if not case.training:
        return forward
    return [
        *forward,
        Phase("V", e * (t * d_out + rank * d_out + t * rank), 2 * t * rank * d_out),
        parts["gram"],
        Phase("expand dX", e * (2 * t * d_in + rank * d_in + t * rank), 2 * t * rank * d_in),
    ]


def gate_phases(case: Case) -> list[Phase]:
    """The gates of all layers: centroids read once, their gradient written once, products in float32."""
    layers, samples, experts = model_named(case.model).layers, case.segments, len(case.ranks)
    table = layers * experts * QUERY_WIDTH
    out = layers * samples * experts
    forward = Phase("gates", 4 * (samples * QUERY_WIDTH + table + out), 2 * out * QUERY_WIDTH)
    backward = Phase("gates backward", 4 * (2 * table + 2 * out), 4 * out * QUERY_WIDTH)
    return [forward, backward] if case.training else [forward]


def phases(case: Case) -> list[Phase]:
    """All phases of a candidate with experts."""
    if case.op in GATE_OPS:
        return gate_phases(case)
    if case.op in ("shrink", "expand", "gram"):
        return expert_phases(case)
    return [*base_phases(case), *expert_phases(case)]
