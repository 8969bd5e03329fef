"""Every operation refuses tensors of another device, dtype or range, alike in each implementation."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import cram_kernels
from cram_kernels import (
    PackedExperts,
    centroid_gates,
    expert_lora,
    orthogonality_penalty,
    routed_expert_lora,
    stacked_expert_lora,
)
from cram_kernels.centroid_gates import api as gates_api
from cram_kernels.expert_lora import api as layer_api
from cram_kernels.expert_lora import routed, stacked, tiles
from cram_kernels.orthogonality import api as penalty_api
from cram_kernels.testing import layer_inputs

META = torch.device("meta")
QUERY = torch.zeros(4, 6)


def layer(**changed: Any) -> dict[str, Any]:
    """Arguments of `expert_lora`, some of them replaced."""
    inputs = layer_inputs(gating="map")
    usual = {"x": inputs.x, "weight": inputs.weight, "bias": inputs.bias, "experts": inputs.experts()}
    return usual | {"gates": inputs.gates, "segments": inputs.segments} | changed


def run_layer(impl: str, **changed: Any) -> Tensor:
    return expert_lora(**layer(**changed), impl=impl)


def run_stack(impl: str, **changed: Any) -> Any:
    one = layer(**changed)
    layers = [(one["weight"], one["bias"], one["experts"])]
    return stacked_expert_lora(one["x"], layers, one["gates"], one["segments"], impl=impl)


def run_routed(impl: str, **changed: Any) -> Tensor:
    one = layer(**changed)
    one.pop("gates")
    one = {"query": QUERY, "centroids": torch.zeros(4, 6), "sigma": 1.0} | one
    return routed_expert_lora(**one, impl=impl)


def moved(name: str) -> Any:
    value = layer()[name]
    return (
        PackedExperts(value.a.to(META), value.bt.to(META), value.ranks, 2.0)
        if name == "experts"
        else value.to(META)
    )


CALLS: dict[str, Callable[..., Any]] = {"layer": run_layer, "stack": run_stack, "routed": run_routed}
IMPLS = ("reference", "cpu", "native", "triton")


def available(op: Any, impl: str) -> None:
    reason = op.why_missing(impl, torch.device("cpu"), torch.float32)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["weight", "bias", "experts", "gates", "segments"])
@pytest.mark.parametrize("call", CALLS)
def test_layer_refuses_another_device(call: str, name: str, impl: str) -> None:
    available(layer_api.OP, impl)
    if call == "routed" and name == "gates":
        pytest.skip("it has no gates")
    in_blocks = {} if name == "segments" else {"segments": None}
    for segments in ({}, in_blocks):
        with pytest.raises(ValueError, match=f"{name} must be on cpu like the first argument, got meta"):
            CALLS[call](impl, **{name: moved(name), **segments})


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("call", CALLS)
def test_layer_refuses_dtype_and_range(call: str, impl: str) -> None:
    available(layer_api.OP, impl)
    for segments in ({}, {"segments": None}):
        with pytest.raises(ValueError, match=r"bias must be torch.float32 \[28\], got torch.float16 \[28\]"):
            CALLS[call](impl, bias=layer()["bias"].half(), **segments)
    for index in (-1, 4):
        segments = layer()["segments"].clone()
        segments[3] = index
        with pytest.raises(
            ValueError, match=rf"segments must lie in \[0, 4\), got values from .*{index}|{index}"
        ):
            CALLS[call](impl, segments=segments)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("call", ["layer", "stack"])
def test_layer_refuses_gates_of_other_experts(call: str, impl: str) -> None:
    """Also more columns than experts, of which a kernel could read the first ones."""
    available(layer_api.OP, impl)
    for columns in (3, 5):
        for segments in ({}, {"segments": None}):
            with pytest.raises(
                ValueError, match=rf"gates must be \[S, 4\] or \[T, 4\], got \[4, {columns}\]"
            ):
                CALLS[call](impl, gates=torch.ones(4, columns), **segments)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("call", CALLS)
def test_layer_refuses_an_input_on_a_device_without_autocast(call: str, impl: str) -> None:
    with pytest.raises((ValueError, NotImplementedError), match="must be on"):
        CALLS[call](impl, x=moved("x"), segments=None)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("call", CALLS)
def test_layer_refuses_rows_of_experts_that_are_not_there(call: str, impl: str) -> None:
    """Also after a call that found them right; what is changed back is right again."""
    available(layer_api.OP, impl)
    experts = layer()["experts"]
    expected = CALLS[call](impl, experts=experts)
    for value in (4, -1, 2**62):
        kept = int(experts.expert_of_row[5])
        experts.expert_of_row[5] = value
        with pytest.raises(
            ValueError, match=rf"expert_of_row must lie in \[0, 4\), got values from .*{value}"
        ):
            CALLS[call](impl, experts=experts)
        experts.expert_of_row[5] = kept
        torch.testing.assert_close(CALLS[call](impl, experts=experts), expected)
    for wrong in (experts.expert_of_row[1:], experts.expert_of_row.int(), experts.expert_of_row.to(META)):
        experts.expert_of_row = wrong
        with pytest.raises(ValueError, match=r"expert_of_row must be int64 \[20\] on cpu, got "):
            CALLS[call](impl, experts=experts)


def test_rows_of_experts_are_read_after_a_change_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    real = torch.aminmax
    monkeypatch.setattr(torch, "aminmax", lambda tensor: read.append(tensor) or real(tensor))
    experts = layer()["experts"]
    for _ in range(3):
        run_layer("cpu", experts=experts, segments=None)
    assert len(read) == 1
    with torch.inference_mode():
        inferred = PackedExperts(experts.a, experts.bt, experts.ranks, 2.0)
        run_layer("cpu", experts=inferred, segments=None)
        inferred.expert_of_row[0] = 9
        with pytest.raises(ValueError, match="expert_of_row must lie in"):
            run_layer("cpu", experts=inferred, segments=None)


@pytest.mark.parametrize("impl", ["reference", "native", "triton"])
@pytest.mark.parametrize("name", ["centroids", "members"])
def test_gates_refuse_another_device(name: str, impl: str) -> None:
    available(gates_api.OP, impl)
    tensors = {"centroids": torch.zeros(2, 3, 6), "members": torch.ones(4, 3, dtype=torch.bool)}
    tensors[name] = tensors[name].to(META)
    with pytest.raises(ValueError, match=f"{name} must be on cpu"):
        centroid_gates(QUERY, tensors["centroids"], 1.0, tensors["members"], impl=impl)


def penalty(impl: str, batch: int = 3, **changed: Any) -> Tensor:
    """The penalty of two modules, some arguments replaced."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    usual: dict[str, Any] = {
        "hidden": [draw(batch, 8), draw(batch, 8)],
        "trained_a": [draw(2, 8).requires_grad_(), draw(3, 8).requires_grad_()],
        "trained_b": [draw(2, 6), draw(3, 6)],
        "bases": [draw(6, 2), draw(6, 1)],
        "gamma": draw(2, batch),
    }
    return orthogonality_penalty(**(usual | changed), scale=1.5, impl=impl)


PENALTY_IMPLS = ("reference", "cpu", "native")


@pytest.mark.parametrize("impl", PENALTY_IMPLS)
@pytest.mark.parametrize("name", ["hidden", "trained_a", "trained_b", "bases", "gamma", "mask"])
def test_penalty_refuses_another_device(name: str, impl: str) -> None:
    available(penalty_api.OP, impl)
    widths = {"hidden": (3, 8), "trained_a": (2, 8), "trained_b": (2, 6), "bases": (6, 2), "gamma": (3,)}
    if name == "mask":
        changed = {
            "hidden": [torch.zeros(3, 5, 8)] * 2,
            "mask": torch.ones(3, 5, dtype=torch.bool, device=META),
        }
    else:
        changed = {
            n: [torch.zeros(s), torch.zeros(s, device=META if n == name else "cpu")]
            for n, s in widths.items()
        }
    if name == "hidden":
        changed["hidden"].reverse()
        with pytest.raises(ValueError, match="must be floating point on meta, got torch.float32 on cpu"):
            penalty(impl, **changed)
        return
    with pytest.raises(ValueError, match=rf"{name} must be .*on cpu, got .*meta"):
        penalty(impl, **changed)


@pytest.mark.parametrize("impl", PENALTY_IMPLS)
def test_penalty_refuses_integers(impl: str) -> None:
    available(penalty_api.OP, impl)
    with pytest.raises(ValueError, match="gamma must be floating point on cpu, got torch.int64"):
        penalty(impl, gamma=torch.ones(2, 3, dtype=torch.int64))


@pytest.mark.parametrize("impl", PENALTY_IMPLS)
def test_penalty_of_no_token_and_no_sample_is_zero(impl: str) -> None:
    """A mask [B, 0] leaves no sample a visual token; a batch without samples has nothing to penalise."""
    available(penalty_api.OP, impl)
    empty = [torch.zeros(3, 0, 8)] * 2
    assert penalty(impl, hidden=empty, mask=torch.zeros(3, 0, dtype=torch.bool)) == 0
    assert penalty(impl, batch=0) == 0


@pytest.mark.parametrize("impl", PENALTY_IMPLS)
def test_module_without_samples_counts_in_the_mean(impl: str) -> None:
    available(penalty_api.OP, impl)
    generator = torch.Generator().manual_seed(1)
    first = [torch.randn(*s, generator=generator) for s in ((3, 8), (2, 8), (2, 6), (6, 2), (3,))]
    none = [torch.zeros(s) for s in ((0, 8), (2, 8), (2, 6), (6, 2), (0,))]
    names = ("hidden", "trained_a", "trained_b", "bases", "gamma")
    both = penalty(impl, **{name: [one, two] for name, one, two in zip(names, first, none, strict=True)})
    alone = penalty(impl, **{name: [one] for name, one in zip(names, first, strict=True)})
    torch.testing.assert_close(both, alone / 2)


@pytest.mark.parametrize(
    ("function", "op"),
    [
        ("expert_lora", layer_api.OP),
        ("centroid_gates", gates_api.OP),
        ("orthogonality_penalty", penalty_api.OP),
    ],
)
def test_documented_implementations_are_those_of_the_operation(function: str, op: Any) -> None:
    documented = getattr(cram_kernels, function).__doc__.split("impl: ")[1].split("\n\n")[0]
    names = set(re.findall(r'"(\w+)"', documented))
    assert names == {"auto", *op.impls}


def test_impl_of_the_other_operations_refers_to_the_layer() -> None:
    for function, op in ((stacked_expert_lora, stacked.OP), (routed_expert_lora, routed.OP)):
        assert (
            "impl: As in `expert_lora`" in str(function.__doc__)
            and op.impls.keys() == layer_api.OP.impls.keys()
        )


@pytest.mark.parametrize(
    ("arch", "family"), [(80, 80), (86, 80), (89, 80), (90, 90), (100, 90), (120, 80), (130, 80)]
)
def test_tiles_fit_the_shared_memory_of_the_architecture(arch: int, family: int) -> None:
    for tokens in (1, 100, 1000, 8192, 10000):
        for dtype in (torch.bfloat16, torch.float32):
            ours = tiles.shrink_tile(arch, dtype, tokens, 80, 4096)
            assert replace(ours, split_k=1) == replace(
                tiles.shrink_tile(family, dtype, tokens, 80, 4096), split_k=1
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_only_short_calls_split(arch: int, dtype: torch.dtype) -> None:
    """The open bucket holds enough blocks for every multiprocessor, in each precision."""
    assert tiles.shrink_tile(arch, dtype, 8193, 80, 4096).split_k == 1
    assert tiles.shrink_tile(arch, dtype, 64, 80, 4096).split_k > 1
