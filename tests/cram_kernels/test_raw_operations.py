"""The native operations themselves, past the public functions: nothing that does not fit is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cram_kernels import native_libraries
from cram_kernels.centroid_gates import native as routing
from cram_kernels.expert_lora import native as layers
from cram_kernels.orthogonality import native as penalty
from cram_kernels.testing import layer_inputs

pytestmark = pytest.mark.skipif(
    native_libraries()["cpu"] is not None, reason=f"no native library: {native_libraries()['cpu']}"
)


def forward_arguments() -> dict[str, Any]:
    """Arguments of the raw forward."""
    inputs = layer_inputs()
    experts = inputs.experts()
    return {
        "x": inputs.x,
        "weight": inputs.weight,
        "bias": inputs.bias,
        "a": experts.a,
        "bt": experts.bt,
        "owner": experts.expert_of_row,
        "gates": inputs.gates,
        "scale": 1.0,
    }


def backward_arguments() -> dict[str, Any]:
    """Arguments of the raw backward that wants everything; the last six rows are trained."""
    usual = forward_arguments()
    del usual["bias"]
    dy, z = torch.ones(24, 28), torch.ones(24, 20)
    needs = dict.fromkeys(("need_x", "need_gates", "need_a", "need_b"), True)
    return {"dy": dy, "z": z, **usual, "tail": 14, "dropped": 0, "row_word": 0, "pair_word": 0, **needs}


def at(index: int, value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda owner: owner.index_fill(0, torch.tensor([index]), value)


FORWARD: list[tuple[dict[str, Any], str]] = [
    ({"gates": lambda g: torch.ones(5, 4)}, "S dividing T = 24, got S = 5"),
    ({"gates": lambda g: g.flatten()}, "gates must have 2 dimensions, got 1"),
    ({"bt": lambda bt: bt[1:]}, "as many rows"),
    ({"bt": lambda bt: bt.flatten()}, "bt must have 2 dimensions"),
    ({"a": lambda a: a.double()}, "a must be float32 or bfloat16"),
    ({"a": lambda a: a[:, 1:]}, r"x, weight and bias must fit a \[R, 19\]"),
    ({"a": lambda a: a[0]}, "a must have 2 dimensions"),
    ({"owner": at(0, 4)}, r"owner must name columns of gates \[S, 4\], got 4"),
    ({"owner": at(19, -1)}, "owner must name columns of gates"),
    ({"owner": at(3, 2**62)}, "owner must name columns of gates"),
    ({"weight": lambda w: w[:27]}, "x, weight and bias must fit"),
    ({"weight": lambda w: w.flatten()}, "x, weight and bias must fit"),
    ({"bias": lambda b: b[:27]}, "x, weight and bias must fit"),
    ({"bias": lambda b: b[None]}, "x, weight and bias must fit"),
    ({"bias": lambda b: b.bfloat16()}, "x, weight and bias must have one dtype"),
    ({"weight": lambda w: w.bfloat16()}, "x, weight and bias must have one dtype"),
    ({"gates": lambda g: g.double()}, "gates must be float32"),
    ({"gates": lambda g: g.double(), "x": lambda x: x[:0]}, "gates must be float32"),
    ({"x": lambda x: x[:, :19]}, "x, weight and bias must fit"),
    ({"x": lambda x: x[0, 0]}, "x, weight and bias must fit"),
]
BACKWARD: list[tuple[dict[str, Any], str]] = [
    ({"tail": lambda t: -1}, r"tail must lie in \[0, 20\], got -1"),
    ({"tail": lambda t: 21}, r"tail must lie in \[0, 20\], got 21"),
    ({"z": lambda z: z[:, 1:]}, r"z must be \[T, rows from the first that is read\], got 19 columns"),
    ({"z": lambda z: z[1:]}, "z must be"),
    ({"z": lambda z: z.repeat(1, 2)}, "z must be"),
    ({"z": lambda z: z[0]}, "z must have 2 dimensions"),
    ({"z": lambda z: z[:, 15:], "need_gates": lambda n: False}, "z must be"),
    ({"dy": lambda dy: dy[:, 1:]}, "x, weight and bias must fit"),
    ({"x": lambda x: None}, r"the gradient of a must be given x \[T, D_in\]"),
    ({"x": lambda x: x[1:]}, "the gradient of a must be given x"),
    ({"x": lambda x: x[:, 1:]}, "the gradient of a must be given x"),
    ({"owner": at(7, 4)}, "owner must name columns of gates"),
]


def changed(usual: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return usual | {name: change(usual[name]) for name, change in changes.items()}


@pytest.mark.parametrize(("changes", "message"), FORWARD)
def test_the_raw_forward_refuses_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    usual = forward_arguments()
    torch.ops.cram.packed_expert_lora(**usual)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.cram.packed_expert_lora(**changed(usual, changes))


@pytest.mark.parametrize("first", [-1, 21])
def test_the_raw_forward_refuses_rows_that_are_not_there(first: int) -> None:
    words = {"dropped": 0, "row_word": 0, "pair_word": 0}
    with pytest.raises(RuntimeError, match=rf"first must lie in \[0, 20\], got {first}"):
        torch.ops.cram.packed_expert_lora_forward(**forward_arguments(), first=first, **words)


@pytest.mark.parametrize(("changes", "message"), BACKWARD)
def test_the_raw_backward_refuses_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    usual = backward_arguments()
    torch.ops.cram.packed_expert_lora_backward(**usual)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.cram.packed_expert_lora_backward(**changed(usual, changes))


@pytest.mark.parametrize("name", ["weight", "bias", "a", "bt", "owner", "gates"])
def test_the_raw_operations_refuse_a_meta_tensor_among_others(name: str) -> None:
    """torch asks for a fake result then; its memory would not be written."""
    forward = changed(forward_arguments(), {name: lambda tensor: tensor.to("meta")})
    assert layers.missing(None, None) is None
    words = {"first": 0, "dropped": 0, "row_word": 0, "pair_word": 0}
    lists = {
        key: [value] for key, value in forward.items() if key not in ("x", "weight", "bias", "owner", "gates")
    }
    lists |= {"weights": [forward["weight"]], "biases": [forward["bias"]], "owners": [forward["owner"]]}
    stacked = {key: lists[key] for key in ("weights", "biases", "a", "bt", "owners")}
    calls = [
        (torch.ops.cram.packed_expert_lora, forward),
        (torch.ops.cram.packed_expert_lora_forward, forward | words),
        (
            torch.ops.cram.packed_expert_lora_stack,
            {"x": forward["x"], **stacked, "gates": forward["gates"], "scale": 1.0},
        ),
    ]
    if name != "bias":
        backward = changed(backward_arguments(), {name: lambda tensor: tensor.to("meta")})
        calls.append((torch.ops.cram.packed_expert_lora_backward, backward))
    for call, arguments in calls:
        with pytest.raises(ValueError, match="all tensors must be on cpu like the first argument, got meta"):
            call(**arguments)


def test_a_raw_stack_needs_all_of_each_layer() -> None:
    usual = forward_arguments()
    packs = [usual["a"]], [usual["bt"]], [usual["owner"]]
    with pytest.raises(RuntimeError, match="each layer of a stack must have a weight, a, bt and owner"):
        torch.ops.cram.packed_expert_lora_stack(
            usual["x"], [usual["weight"]] * 2, [], *packs, usual["gates"], 1.0
        )


@pytest.mark.parametrize(("batch", "tokens"), [(0, 3), (3, 0), (0, 0), (2, 3)])
def test_the_raw_penalty_takes_an_empty_mask_for_a_mask(batch: int, tokens: int) -> None:
    """An empty tensor has no address, and means of no tokens are zero."""
    hidden = torch.ones(batch, tokens, 8)
    mask = torch.zeros(batch, tokens, dtype=torch.bool)
    factors = torch.ones(2, 8), torch.ones(2, 6)
    basis = torch.eye(6)[:, :2]
    loss, *gradients = torch.ops.cram.orthogonality_penalty(
        [hidden], [factors[0]], [factors[1]], [basis], torch.ones(batch), mask, 1.0, True, True, True, True
    )
    assert loss == 0 and [len(each) for each in gradients] == [batch * 8, 16, 12, batch]
    assert not any(each.any() for each in gradients)


def test_the_raw_penalty_refuses_a_meta_tensor_among_others() -> None:
    assert penalty.missing(None, None) is None
    hidden, a, bt, basis = torch.ones(2, 8), torch.ones(2, 8), torch.ones(2, 6), torch.eye(6)[:, :2]
    with pytest.raises(ValueError, match="all tensors must be on cpu like the first argument, got meta"):
        torch.ops.cram.orthogonality_penalty(
            [hidden], [a], [bt.to("meta")], [basis], torch.ones(2), None, 1.0, *[True] * 4
        )


GATES: list[tuple[dict[str, Any], str]] = [
    ({"query": lambda q: q.double()}, "query must be float32"),
    ({"query": lambda q: q[0]}, "query must have 2 dimensions, got 1"),
    ({"query": lambda q: q[:, 1:]}, r"query \[S, D_q\] and centroids \[L, E, D_q\] must fit, got 7 and 8"),
    ({"centroids": lambda c: c[0]}, "centroids must have 3 dimensions, got 2"),
    ({"centroids": lambda c: c.bfloat16()}, "centroids must be float32"),
    ({"sigma": lambda sigma: 0.0}, "sigma must be positive, got 0"),
    ({"sigma": lambda sigma: float("nan")}, "sigma must be positive, got nan"),
    ({"members": lambda m: m.float()}, r"members must be bool \[3, 4\]"),
    ({"members": lambda m: m[1:]}, r"members must be bool \[3, 4\]"),
    ({"members": lambda m: m[:, 1:]}, r"members must be bool \[3, 4\]"),
    ({"members": lambda m: m[0]}, "members must have 2 dimensions, got 1"),
]


def gates_arguments() -> dict[str, Any]:
    """Arguments of the raw gates."""
    members = torch.ones(3, 4, dtype=torch.bool)
    return {"query": torch.ones(3, 8), "centroids": torch.ones(2, 4, 8), "sigma": 1.0, "members": members}


@pytest.mark.parametrize(("changes", "message"), GATES)
def test_the_raw_gates_refuse_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    usual = gates_arguments()
    torch.testing.assert_close(torch.ops.cram.native_centroid_gates(**usual), torch.full((2, 3, 4), 0.25))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.cram.native_centroid_gates(**changed(usual, changes))


@pytest.mark.parametrize("name", ["centroids", "members"])
def test_the_raw_gates_refuse_a_meta_tensor_among_others(name: str) -> None:
    assert routing.missing(None, None) is None
    arguments = changed(gates_arguments(), {name: lambda tensor: tensor.to("meta")})
    with pytest.raises(ValueError, match="all tensors must be on cpu like the first argument, got meta"):
        torch.ops.cram.native_centroid_gates(**arguments)


def test_the_raw_gates_read_strided_tensors() -> None:
    query, centroids = torch.randn(8, 3).T, torch.randn(2, 8, 4).mT
    members = (torch.rand(4, 3) < 0.6).T
    expected = torch.ops.cram.native_centroid_gates(
        query.contiguous(), centroids.contiguous(), 2.0, members.contiguous()
    )
    assert torch.equal(torch.ops.cram.native_centroid_gates(query, centroids, 2.0, members), expected)


def test_opcheck_of_the_raw_gates() -> None:
    assert routing.missing(None, None) is None
    torch.library.opcheck(torch.ops.cram.native_centroid_gates.default, tuple(gates_arguments().values()))
