"""What kernel tests and benchmarks share: inputs, a float64 oracle, the error budget, poisoned memory.

The budget has no hand-made tolerance: an implementation may err by twice what the plain PyTorch computation
in the same precision errs on the same inputs, plus one rounding of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cram_kernels.expert_lora import expert_lora
from cram_kernels.packing import PackedExperts, pack_experts

GATINGS = ("segment", "token", "map")


@dataclass(frozen=True)
class LayerInputs:
    """One expert_lora call: x [T, D_in], experts in PEFT's shapes, gates [S, E], gradient dy [T, D_out]."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    a: tuple[Tensor, ...]
    b: tuple[Tensor, ...]
    gates: Tensor
    segments: Tensor | None
    dy: Tensor
    scale: float = 2.0
    trained: int = 1
    shared_a: bool = False

    def experts(self) -> PackedExperts:
        """Pack the experts."""
        if not self.a:
            widths = self.x.shape[-1], self.dy.shape[-1]
            return PackedExperts.empty(*widths, self.scale, self.x.dtype, self.x.device)
        return pack_experts(self.a, self.b, self.scale, self.trained, self.shared_a)

    def token_gates(self) -> Tensor:
        """Spread the gates over tokens: [T, E]."""
        if self.segments is not None:
            return self.gates[self.segments]
        return self.gates.repeat_interleave(len(self.x) // max(len(self.gates), 1), 0)

    def to(
        self,
        dtype: torch.dtype,
        expert_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> LayerInputs:
        """Cast everything but the gates, experts to `expert_dtype` where it is given; move it all."""
        return replace(
            self,
            x=self.x.to(device, dtype),
            weight=self.weight.to(device, dtype),
            bias=self.bias.to(device, dtype),
            dy=self.dy.to(device, dtype),
            a=tuple(a.to(device, expert_dtype or dtype) for a in self.a),
            b=tuple(b.to(device, expert_dtype or dtype) for b in self.b),
            gates=self.gates.to(device),
            segments=None if self.segments is None else self.segments.to(device),
        )


def layer_inputs(
    ranks: Sequence[int] = (4, 9, 1, 6),
    tokens: int = 24,
    in_features: int = 20,
    out_features: int = 28,
    *,
    gating: str = "segment",
    segment_count: int = 4,
    trained: int = 1,
    shared_a: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> LayerInputs:
    """Make random inputs of unit-scale outputs.

    Args:
        ranks: Rank of each expert.
        tokens: T; with gating "segment" a multiple of `segment_count`.
        in_features: D_in.
        out_features: D_out.
        gating: "segment" (even blocks), "token" (one gate row a token) or "map" (segments in arbitrary
            order).
        segment_count: S, unless gating is "token".
        trained: How many of the last experts are trained.
        shared_a: Whether all experts read the first one's A; equal ranks.
        dtype: Of everything but the gates, which are float32 (float64 with float64).
        seed: Of the random generator.

    Raises:
        ValueError: `gating` is unknown.
    """
    if gating not in GATINGS:
        raise ValueError(f"gating must be one of {GATINGS}, got {gating!r}")
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, fan: int = 1) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) / max(fan, 1) ** 0.5).to(dtype)

    rows = tokens if gating == "token" else segment_count
    logits = torch.randn(rows, len(ranks), generator=generator, dtype=torch.float64)
    x, weight = draw(tokens, in_features), draw(out_features, in_features, fan=in_features)
    bias, a = draw(out_features), tuple(draw(r, in_features, fan=in_features) for r in ranks)
    return LayerInputs(
        x=x,
        weight=weight,
        bias=bias,
        a=a[:1] * len(a) if shared_a else a,
        b=tuple(draw(out_features, r, fan=r) for r in ranks),
        gates=logits.softmax(-1).to(torch.promote_types(dtype, torch.float32)),
        segments=torch.randint(rows, (tokens,), generator=generator) if gating == "map" else None,
        dy=draw(tokens, out_features),
        trained=min(trained, len(ranks)),
        shared_a=shared_a,
    )


def run_layer(inputs: LayerInputs, impl: str, *, dropout: float = 0.0, seed: int = 0) -> dict[str, Tensor]:
    """Run expert_lora forward and backward; return y and the gradients by name."""
    experts = inputs.experts()
    x, gates = inputs.x.detach().requires_grad_(), inputs.gates.detach().requires_grad_()
    y = expert_lora(
        x, inputs.weight, inputs.bias, experts, gates, inputs.segments, dropout=dropout, seed=seed, impl=impl
    )
    y.backward(inputs.dy)
    leaves = {"x": x, "gates": gates, "a": experts.trained_a, "b": experts.trained_b}
    grads = {f"d{name}": _grad(leaf) for name, leaf in leaves.items() if leaf is not None}
    return {"y": y.detach(), **grads}


def _grad(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def layer_oracle(
    inputs: LayerInputs, keep: Tensor | None = None, keep_scale: float = 1.0
) -> dict[str, Tensor]:
    """Compute `run_layer`'s results in float64, expert by expert from the unpacked factors.

    Args:
        inputs: The inputs; their values are taken as they are, rounding included.
        keep: Dropout mask [T, D_in], or None.
        keep_scale: Factor of the kept elements.
    """
    wide = inputs.to(torch.float64)

    def layer(x: Tensor, token_gates: Tensor, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        y = F.linear(x, wide.weight, wide.bias)
        dropped = x if keep is None else x * keep * keep_scale
        for e, (a_e, b_e) in enumerate(zip(a, b, strict=True)):
            y = y + token_gates[:, e : e + 1] * inputs.scale * (dropped @ a_e.t() @ b_e.t())
        return y

    return _differentiate(replace(wide, gates=inputs.gates.double()), layer)


def layer_plain(inputs: LayerInputs) -> dict[str, Tensor]:
    """Compute `run_layer`'s results in plain PyTorch at the inputs' precision: the yardstick of the budget.

    Both projections round to x.dtype; gates are applied in float32.
    """

    def layer(x: Tensor, token_gates: Tensor, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        y = F.linear(x, inputs.weight, inputs.bias)
        if not a:
            return y
        widths = torch.tensor([len(a_e) for a_e in a], device=x.device)
        z = F.linear(x, torch.cat(list(a)).to(x.dtype))
        u = (z * (token_gates * inputs.scale).repeat_interleave(widths, 1)).to(x.dtype)
        return y + F.linear(u, torch.cat(list(b), 1).to(x.dtype))

    return _differentiate(inputs, layer)


def _differentiate(
    inputs: LayerInputs, layer: Callable[[Tensor, Tensor, Sequence[Tensor], Sequence[Tensor]], Tensor]
) -> dict[str, Tensor]:
    x, gates = inputs.x.detach().requires_grad_(), inputs.gates.detach().requires_grad_()
    a = [a_e.detach().requires_grad_() for a_e in inputs.a]
    b = [b_e.detach().requires_grad_() for b_e in inputs.b]
    y = layer(x, replace(inputs, gates=gates).token_gates(), a, b)
    leaves = (x, gates, *a, *b)
    found = torch.autograd.grad(y, leaves, inputs.dy.to(y.dtype), allow_unused=True)
    grads = [
        torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)
    ]
    results = {"y": y.detach(), "dx": grads[0], "dgates": grads[1]}
    if inputs.trained:
        first, count = len(a) - inputs.trained, len(a)
        # One A gets what its copies get, those of frozen experts included.
        shares = torch.stack(grads[2 : 2 + count]).sum(0) if inputs.shared_a else None
        results["da"] = torch.cat(grads[2 + first : 2 + count]) if shares is None else shares
        results["db"] = torch.cat([grad.t() for grad in grads[2 + count + first :]])
    return results


def assert_within_budget(
    actual: Mapping[str, Tensor], plain: Mapping[str, Tensor], oracle: Mapping[str, Tensor]
) -> None:
    """Assert that `actual` errs at most twice as much as `plain`, plus one rounding band, in every tensor.

    Errors are taken against `oracle`, both the largest and the root mean square over the tensor, so that
    neither an outlier nor a small error everywhere passes.

    Raises:
        AssertionError: A tensor is missing, not finite where the oracle is, or beyond the budget; names it.
    """
    assert set(actual) == set(oracle), f"must return {sorted(oracle)}, got {sorted(actual)}"
    for name, expected in oracle.items():
        got = actual[name]
        assert got.shape == expected.shape, f"{name} must be {list(expected.shape)}, got {list(got.shape)}"
        if not expected.numel():
            continue
        band = torch.finfo(got.dtype).eps * expected.abs()
        error = (got.double() - expected).abs()
        allowed = (plain[name].double() - expected).abs()
        for measure, largest in (("largest", torch.amax), ("root mean square", _root_mean_square)):
            limit = 2 * largest(allowed) + largest(band)
            found = largest(error)
            assert found <= limit, f"{name}: {measure} error must be at most {limit:.3g}, got {found:.3g}"


def assert_within_rounding(
    actual: Mapping[str, Tensor], inputs: LayerInputs, keep: Tensor | None = None, keep_scale: float = 1.0
) -> None:
    """Assert that every element of `run_layer`'s results errs by rounding alone, however small the tensor.

    The formula on the inputs' absolute values sums the sizes of an element's terms. Five roundings to x.dtype
    (base, both projections, gate, sum) and float32 sums over tokens, ranks and both widths may each cost one
    eps of it. For tensors too small for the statistics of `assert_within_budget`.

    Args:
        actual: Some or all of `run_layer`'s results.
        inputs: What they were computed from.
        keep: Dropout mask [T, D_in], or None.
        keep_scale: Factor of the kept elements.

    Raises:
        AssertionError: A tensor has another shape or an element is beyond its bound; names it.
    """
    parts = ("x", "weight", "bias", "gates", "dy")
    positive = replace(inputs, **{name: getattr(inputs, name).abs() for name in parts})
    positive = replace(positive, a=tuple(a.abs() for a in inputs.a), b=tuple(b.abs() for b in inputs.b))
    oracle, sizes = (layer_oracle(each, keep, keep_scale) for each in (inputs, positive))
    dtype, terms = inputs.x.dtype, len(inputs.x) + sum(map(len, inputs.a)) + sum(inputs.weight.shape)
    share = 5 * torch.finfo(dtype).eps + terms * torch.finfo(torch.float32).eps
    for name, got in actual.items():
        expected = oracle[name]
        assert got.shape == expected.shape, f"{name} must be {list(expected.shape)}, got {list(got.shape)}"
        limit = share * sizes[name] + torch.finfo(dtype).tiny
        beyond = ~((got.double() - expected).abs() <= limit)
        assert not beyond.any(), f"{name}: {int(beyond.sum())} elements must err by rounding alone"


def _root_mean_square(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Fill memory that PyTorch hands out uninitialised with NaN (or the largest integer) inside the block."""
    deterministic: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        deterministic.fill_uninitialized_memory = before[1]
