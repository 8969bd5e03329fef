"""The released loop against the authors' outputs, parts against float64, byte model against launches."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch

from benchmarks import cases, floors, parts, truth
from benchmarks.baselines import loops, packed
from benchmarks.cases import PART_OPS, Case
from benchmarks.problem import SCALE, Layer, Problem, make, plain_gates, rotation, smaller
from cram_kernels.launch import Launch
from tests.conftest import golden_case

CPU = torch.device("cpu")


@pytest.mark.parametrize("build", [loops.released, loops.loop, packed.packed])
def test_loops_give_the_released_outputs(build: object, monkeypatch: pytest.MonkeyPatch) -> None:
    entry, tensors = golden_case("cram_layer__pi_three")
    assert entry["config"]["scale"] == SCALE
    used = tensors["param.expert_mask"].nonzero().flatten().tolist()
    ranks = tensors["param.expert_rank"][used].tolist()
    monkeypatch.setitem(cases.STREAMS, "golden", tuple(ranks))
    x, y = tensors["in.x"].flatten(0, 1), tensors["out.y"].flatten(0, 1)
    pairs = list(zip(used, ranks, strict=True))
    p = Problem(
        case=Case("forward", "toy", "q", "golden", len(x), 1, "float32"),
        x=x,
        weight=tensors["param.weight"],
        bias=None,
        dy=y,
        a=tuple(tensors["param.expert_A"][e, :r] for e, r in pairs),
        b=tuple(tensors["param.expert_B"][e, :, :r].contiguous() for e, r in pairs),
        gates=tensors["in.pi"][None, used],
        query=x,
        centroids=x,
    )
    got = build(p).forward()  # type: ignore[operator]
    # Sums of 24 + 24 float32 products.
    torch.testing.assert_close(got, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", PART_OPS)
@pytest.mark.parametrize("tokens", [3, 80])
def test_kernel_parts_compute_the_product(op: str, tokens: int) -> None:
    pytest.importorskip("triton")
    p = make(Case(op, "toy", "k", "toy", tokens, 1, "float32"), CPU)
    with torch.no_grad():
        got = truth.results(p, parts.triton_part(p))
    assert truth.error(got, truth.parts(p), truth.LIMITS["float32"]) < 1e-5


@pytest.mark.parametrize("op", ["shrink", "expand"])
def test_byte_model_is_that_of_the_launch(op: str) -> None:
    pytest.importorskip("triton")
    case = Case(op, "toy", "k", "64x8", 80, 1, "float32")
    p = make(case, CPU)
    tile = parts.shipped_tile(p)
    tile = replace(tile, split_k=1) if op == "shrink" else tile
    launches: list[Launch] = []
    with mock.patch.object(Launch, "run", lambda launch: launches.append(launch)):
        parts.triton_part(p, tile).forward()
    (launch,) = launches
    (phase,) = floors.expert_phases(case)
    assert (launch.moved_bytes, launch.flops) == (phase.moved_bytes, phase.flops)


def test_floors_of_a_training_step() -> None:
    case = Case("train", "toy", "k", "toy", 1024, 8, "bfloat16")
    found = {phase.name: (phase.moved_bytes, phase.flops) for phase in floors.phases(case)}
    t, d_in, d_out, rank, last = 1024, 64, 32, 8, 3
    assert found["base dX"] == (2 * (t * d_in + d_in * d_out + t * d_out), 2 * t * d_in * d_out)
    assert found["expand dX"] == (2 * (2 * t * d_in + rank * d_in + t * rank), 2 * t * rank * d_in)
    assert found["V"] == (2 * (t * d_out + rank * d_out + t * rank), 2 * t * rank * d_out)
    assert found["gram"][1] == 2 * t * last * (d_in + d_out)
    ceilings = floors.Ceilings(1.0, {"bfloat16": 1e9})
    assert ceilings.floor_us(floors.phases(case), "bfloat16") == sum(moved for moved, _ in found.values())


def test_groups_have_gates_of_exactly_zero_outside() -> None:
    p = make(Case("forward", "toy", "k", "trigap-groups", 24, 6, "float32"), CPU)
    live = p.gates != 0
    assert live.sum(1).tolist() == [4, 4, 2, 4, 4, 2]
    assert live[0].nonzero().flatten().tolist() == [0, 1, 2, 3] and live[2].tolist()[8:] == [True, True]
    torch.testing.assert_close(p.gates.sum(1), torch.ones(6))


def test_plain_gates_are_the_formula() -> None:
    p = make(Case("gates", "toy", "", "toy", 5, 5, "float32"), CPU)
    gates = plain_gates(p.query, p.centroids)
    torch.testing.assert_close(gates, truth.gates(p)["y"].float(), rtol=1e-5, atol=1e-6)


def test_rotation_exceeds_the_cache() -> None:
    case = Case("decode", "toy", "q", "toy", 1, 1, "float32")
    sets = rotation(case, CPU, cache_bytes=30_000)
    assert sum(p.nbytes for p in sets) >= 4 * 30_000
    assert len(sets) > 2 and not torch.equal(sets[0].weight, sets[1].weight)


@pytest.mark.parametrize(
    ("tokens", "segments", "kept"),
    [(64, 8, (64, 8)), (8192, 8, (64, 1)), (8192, 8192, (64, 64)), (96, 8, (60, 5))],
)
def test_smaller_keeps_tokens_a_segment(tokens: int, segments: int, kept: tuple[int, int]) -> None:
    case = smaller(Case("forward", "toy", "q", "toy", tokens, segments, "float32"), 64)
    assert (case.tokens, case.segments) == kept


def test_a_layer_without_gradient_of_gates_is_refused() -> None:
    p = make(Case("train", "toy", "k", "toy", 8, 1, "float32"), CPU)
    layer = loops.loop(p)
    renamed = Layer(layer.forward, {f"other_{name}": t for name, t in layer.leaves.items()})
    with pytest.raises(truth.Wrong, match="must give y and a gradient of"):
        truth.error(truth.results(p, renamed), truth.experts(p), 1e-4)
