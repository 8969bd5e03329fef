"""The gate: the right results in float64, and the largest allowed distance from them.

Limits are on |out - truth| / |truth| over a whole tensor. They catch a wrong function, such as a lost expert
or a wrong gate, and allow for rounding in any order. The error budget of the tests is narrower.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.problem import SCALE, SIGMA, Layer, Problem
from cram_kernels.testing import LayerInputs, layer_oracle

# Roundings of 2^-8, 2^-11 and 2^-24 in each of ten experts' sums.
LIMITS = {"bfloat16": 2e-2, "float16": 3e-3, "float32": 1e-4}

Truth = Callable[[Problem], dict[str, Tensor]]


class Wrong(RuntimeError):
    """A candidate computed something else."""


def _inputs(p: Problem) -> LayerInputs:
    bias = p.x.new_zeros(p.weight.shape[0]) if p.bias is None else p.bias
    gates = _gates(p).float()[0] if p.case.op == "routed" else p.gates
    return LayerInputs(p.x, p.weight, bias, p.a, p.b, gates, None, p.dy, SCALE, trained=int(p.case.training))


def experts(p: Problem) -> dict[str, Tensor]:
    """The gated experts."""
    return layer_oracle(_inputs(p))


def base(p: Problem) -> dict[str, Tensor]:
    """The base linear alone."""
    return layer_oracle(replace(_inputs(p), a=(), b=(), trained=0))


def lora(p: Problem, rank: int | None = None) -> dict[str, Tensor]:
    """One ungated LoRA of the first `rank` packed rows."""
    a, b = (p.packed_a[:rank],), (p.packed_bt[:rank].t(),)
    return layer_oracle(replace(_inputs(p), a=a, b=b, gates=p.gates.new_ones(1, 1)))


def lora9(p: Problem) -> dict[str, Tensor]:
    """One ungated LoRA of rank 9."""
    return lora(p, 9)


def stacked(truth: Truth) -> Truth:
    """The results of a stack of layers: outputs side by side, and summed gradients of shared inputs."""

    def merged(p: Problem) -> dict[str, Tensor]:
        found = [truth(replace(one, siblings=())) for one in p.stack]
        sums = {n: torch.stack([f[n] for f in found]).sum(0) for n in ("dx", "dgates") if n in found[0]}
        own = {f"{n}{i}": t for i, f in enumerate(found) for n, t in f.items() if n in ("da", "db")}
        return {"y": torch.cat([f["y"] for f in found], -1), **sums, **own}

    return merged


def _gates(p: Problem, centroids: Tensor | None = None) -> Tensor:
    query = p.query.double()
    centroids = p.centroids.double() if centroids is None else centroids
    offset = query[None, :, None] - centroids[:, None]
    return (-offset.square().sum(-1) / (2 * SIGMA**2)).softmax(-1)


def gates(p: Problem) -> dict[str, Tensor]:
    """Gates of all layers and the centroids' gradient."""
    centroids = p.centroids.double().requires_grad_()
    y = _gates(p, centroids)
    (gradient,) = torch.autograd.grad(y, centroids, p.dy.double())
    return {"y": y.detach(), "dcentroids": gradient}


def parts(p: Problem) -> dict[str, Tensor]:
    """One product: U, or y + U Bt (with dy as y), or both weight gradients one after another."""
    x, a, bt, dy = p.x.double(), p.packed_a.double(), p.packed_bt.double(), p.dy.double()
    w = (p.over_tokens(p.gates).double() * SCALE)[:, p.owner]
    u = (x @ a.t()) * w
    if p.case.op == "shrink":
        return {"y": u}
    if p.case.op == "expand":
        return {"y": dy + u @ bt}
    tail = len(a) - p.trained_rank
    dz = (dy @ bt.t()) * w
    return {"y": torch.cat([(dz[:, tail:].t() @ x).flatten(), (u[:, tail:].t() @ dy).flatten()])}


def results(p: Problem, layer: Layer) -> dict[str, Tensor]:
    """Run a layer once: forward, and backward in training cases. Return y and the gradients by name."""
    if not p.case.training:
        with torch.no_grad():
            return {"y": _joined(layer.forward())}
    y = layer.forward()
    found = torch.autograd.grad(y, tuple(layer.leaves.values()), p.gradients)
    return {"y": _joined(y).detach(), **{f"d{name}": g for name, g in zip(layer.leaves, found, strict=True)}}


def _joined(y: Tensor | tuple[Tensor, ...]) -> Tensor:
    return y if isinstance(y, Tensor) else torch.cat(y, -1)


def error(actual: dict[str, Tensor], expected: dict[str, Tensor], limit: float) -> float:
    """Return the largest |out - truth| / |truth| over the expected tensors.

    Raises:
        Wrong: If a tensor is missing or not finite, or if its error exceeds `limit`.
    """
    shared = [name for name in actual if name in expected]
    if "y" not in shared or (len(actual) > 1 and len(shared) < 2):
        raise Wrong(f"must give y and a gradient of {sorted(expected)}, got {sorted(actual)}")
    largest = 0.0
    for name in shared:
        got, truth = actual[name], expected[name]
        if got.shape != truth.shape:
            raise Wrong(f"{name} must be {list(truth.shape)}, got {list(got.shape)}")
        found = float((got.double() - truth).norm() / truth.norm().clamp(min=1e-30))
        if not found <= limit:
            raise Wrong(f"{name} must be within {limit:g} of the truth, got {found:.3g}")
        largest = max(largest, found)
    return largest
