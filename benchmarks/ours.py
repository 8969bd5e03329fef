"""The package through its public functions, one implementation at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.problem import SIGMA, Layer, Problem, leaf, plain_gates
from cram_kernels import centroid_gates, expert_lora, routed_expert_lora, stacked_expert_lora
from cram_kernels.centroid_gates import api as gates_api
from cram_kernels.expert_lora import api as layer_api
from cram_kernels.expert_lora import routed, stacked
from cram_kernels.orthogonality import api as penalty_api

OPS = {m.OP.name: m.OP for m in (layer_api, stacked, routed, gates_api, penalty_api)}


def missing(op: str, impl: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why an implementation has no figure on a device, or None."""
    # Triton's interpreter is for tests. Its times say nothing about a GPU.
    if impl == "triton" and device.type != "cuda":
        return "Triton needs a CUDA device"
    return OPS[op].why_missing(impl, device, dtype)


def two_ops(p: Problem, impl: str) -> Layer:
    """expert_lora. Its gates are given, or computed by centroid_gates in the same call."""
    experts = p.experts()
    x, gates = leaf(p.x), leaf(p.gates)
    if p.case.op == "routed":

        def with_routing() -> torch.Tensor:
            computed = centroid_gates(p.query, p.centroids, SIGMA)[0]
            return expert_lora(x, p.weight, p.bias, experts, computed, impl=impl)

        return Layer(with_routing, {})
    trained = {"a": experts.trained_a, "b": experts.trained_b}
    leaves = {"x": x, "gates": gates, **{name: t for name, t in trained.items() if t is not None}}
    return Layer(lambda: expert_lora(x, p.weight, p.bias, experts, gates, impl=impl), leaves)


def one_product(p: Problem) -> Layer:
    """[x | U] [W | B] as one product by the package's kernels: x lies in rows with room for U."""
    from cram_kernels.expert_lora import wide

    experts = p.experts()
    rows, weight = F.pad(p.x, (0, wide.room(experts))), wide.widened(p.weight, experts)
    return Layer(lambda: wide.wide_expert_lora(rows, weight, p.bias, experts, p.gates), {})


def one_op(p: Problem, impl: str) -> Layer:
    """routed_expert_lora."""
    experts, centroids = p.experts(), p.centroids[0]
    return Layer(
        lambda: routed_expert_lora(p.x, p.weight, p.bias, experts, p.query, centroids, SIGMA, impl=impl), {}
    )


def all_gates(p: Problem, impl: str | None) -> Layer:
    """centroid_gates of all layers. With None, the plain formula."""
    centroids = leaf(p.centroids)
    if impl is None:
        return Layer(lambda: plain_gates(p.query, centroids), {"centroids": centroids})
    return Layer(lambda: centroid_gates(p.query, centroids, SIGMA, impl=impl), {"centroids": centroids})


def one_stack(p: Problem, impl: str) -> Layer:
    """stacked_expert_lora."""
    x, gates = leaf(p.x), leaf(p.gates)
    experts = [one.experts() for one in p.stack]
    layers = [(one.weight, one.bias, packed) for one, packed in zip(p.stack, experts, strict=True)]
    own = {f"a{i}": e.trained_a for i, e in enumerate(experts)} | {
        f"b{i}": e.trained_b for i, e in enumerate(experts)
    }
    leaves = {"x": x, "gates": gates, **{name: t for name, t in own.items() if t is not None}}
    return Layer(lambda: stacked_expert_lora(x, layers, gates, impl=impl), leaves)
