"""centroid_gates on Triton: precision, isolation, memory, the two operations, and what a GPU must show."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from cram_kernels import centroid_gates
from cram_kernels.launch import Launch
from cram_kernels.testing import assert_within_budget, poisoned_allocations
from tests.cram_kernels.devices import needs_cuda, needs_interpreter

kernels = pytest.importorskip("cram_kernels.centroid_gates.kernels", exc_type=ImportError)
Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor]


@pytest.fixture(params=[pytest.param("cpu", marks=needs_interpreter), pytest.param("cuda", marks=needs_cuda)])
def draw(request: pytest.FixtureRequest) -> Callable[..., Inputs]:
    """Make inputs on the device that the test runs on."""
    return partial(inputs_on, torch.device(request.param))


def inputs_on(
    device: torch.device,
    layers: int,
    samples: int,
    experts: int,
    width: int,
    *,
    masked: bool = True,
    seed: int = 0,
) -> Inputs:
    """Return query, centroids, members (a row without any among them) and a gradient of the gates."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    query, centroids = normal(samples, width), normal(layers, experts, width)
    grad = normal(layers, samples, experts)
    if not masked:
        return query, centroids, None, grad
    members = torch.rand(samples, experts, generator=generator) > 0.4
    members[samples // 2] = False
    return query, centroids, members.to(device), grad


def formula(query: Tensor, centroids: Tensor, sigma: float, members: Tensor | None) -> Tensor:
    """Plain PyTorch by direct differences, which cancel nowhere."""
    logits = -(query[None, :, None] - centroids[:, None]).square().sum(-1) / (2 * sigma**2)
    if members is not None:
        logits = logits.masked_fill(~members, -torch.inf)
    return logits.softmax(-1).nan_to_num(0.0)


def fused(query: Tensor, centroids: Tensor, sigma: float, members: Tensor | None, **options: Any) -> Tensor:
    return centroid_gates(query, centroids, sigma, members, impl="triton", **options)


def results(
    gates_of: Callable[..., Tensor],
    query: Tensor,
    centroids: Tensor,
    members: Tensor | None,
    grad: Tensor,
    sigma: float = 2.0,
    **options: Any,
) -> dict[str, Tensor]:
    """Return the gates and both gradients by name."""
    query, centroids = query.detach().requires_grad_(), centroids.detach().requires_grad_()
    gates = gates_of(query, centroids, sigma, members, **options)
    dquery, dcentroids = torch.autograd.grad(gates, (query, centroids), grad.to(gates.dtype))
    return {"gates": gates.detach(), "dquery": dquery, "dcentroids": dcentroids}


def assert_precise(
    query: Tensor, centroids: Tensor, members: Tensor | None, grad: Tensor, sigma: float = 2.0
) -> None:
    wide = results(formula, query.double(), centroids.double(), members, grad, sigma)
    plain = results(formula, query, centroids, members, grad, sigma)
    assert_within_budget(results(fused, query, centroids, members, grad, sigma), plain, wide)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


# A size for each row of the table of tiles, blocks filled and not; D_q over several blocks. With 300 experts
# D_q is not tiny: the interpreter sums dquery's terms one expert after another, a GPU in a tree.
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 5, 3, 7),
        (1, 1, 1, 1),
        (3, 4, 8, 200),
        (2, 9, 13, 65),
        (1, 3, 20, 70),
        (1, 3, 33, 40),
        (1, 2, 128, 33),
        (1, 2, 300, 40),
    ],
)
def test_within_budget(draw: Callable[..., Inputs], shape: tuple[int, int, int, int], masked: bool) -> None:
    assert_precise(*draw(*shape, masked=masked))


@pytest.mark.parametrize("sigma", [0.3, 20.0])
@pytest.mark.parametrize("away", [0.0, 60.0])
def test_precision_far_from_the_origin(draw: Callable[..., Inputs], away: float, sigma: float) -> None:
    """Norms of 60 and distances of 1, saturated and soft; one query hits a centroid exactly."""
    query, centroids, members, grad = draw(2, 4, 5, 96)
    base = torch.randn_like(query[0])
    base *= away / base.norm()
    query, centroids = base + 0.1 * query, base + 0.1 * centroids
    query[0] = centroids[0, 1]
    assert_precise(query, centroids, members, grad, sigma)


def test_precision_where_queries_are_far_from_all_members(draw: Callable[..., Inputs]) -> None:
    """The distance common to all members leaves the logits before it can round them."""
    query, centroids, _, _ = draw(1, 4, 5, 96, masked=False)
    query, centroids = 30 * query, 0.02 * centroids
    exact = formula(query.double(), centroids.double(), 2.0, None)
    errors = [(f(query, centroids, 2.0, None) - exact).abs().max() for f in (fused, formula)]
    assert errors[0] < errors[1] / 20


def test_precision_beside_a_member_far_away(draw: Callable[..., Inputs]) -> None:
    """The anchor is the nearest member: a far one, though first, does not cost the others their precision."""
    query, centroids, _, grad = draw(1, 4, 5, 96, masked=False)
    query, centroids = 0.1 * query, 0.1 * centroids
    centroids[:, 0] += 60.0
    assert_precise(query, centroids, None, grad)


@pytest.mark.parametrize("trained", [0, 1, 3, 9])
def test_gradient_of_a_trained_suffix(draw: Callable[..., Inputs], trained: int) -> None:
    """Rows before it are exactly zero, the others and the query's gradient those of a full backward."""
    inputs = draw(2, 5, 9, 20)
    found, full = (results(fused, *inputs, trained=n) for n in (trained, None))
    first = 9 - trained
    assert not found["dcentroids"][:, :first].any()
    torch.testing.assert_close(found["dcentroids"][:, first:], full["dcentroids"][:, first:])
    assert torch.equal(found["dquery"], full["dquery"])


def test_a_batch_equals_its_samples_and_layers_bit_by_bit(draw: Callable[..., Inputs]) -> None:
    query, centroids, members, _ = draw(3, 7, 5, 40)
    assert members is not None
    gates = fused(query, centroids, 2.0, members)
    for s in range(7):
        assert torch.equal(gates[:, s : s + 1], fused(query[s : s + 1], centroids, 2.0, members[s : s + 1]))
    for layer in range(3):
        assert torch.equal(gates[layer : layer + 1], fused(query, centroids[layer : layer + 1], 2.0, members))


def test_strided_inputs(draw: Callable[..., Inputs]) -> None:
    """Rows at any distance, expanded rows, columns that are not contiguous, an expanded gradient."""
    query, centroids, members, grad = draw(3, 6, 5, 40)
    assert members is not None
    expected = results(fused, query, centroids, members, grad)
    rows = [query.new_full((6, 97), torch.nan), centroids.new_full((3, 9, 97), torch.nan)]
    rows[0][:, 3:43], rows[1][:, 2:7, 3:43] = query, centroids
    assert_same(results(fused, rows[0][:, 3:43], rows[1][:, 2:7, 3:43], members, grad), expected)
    columns = [t.mT.contiguous().mT for t in (query, centroids, members)]
    assert_same(results(fused, *columns, grad.mT.contiguous().mT), expected)
    alike = (
        query[:1].expand(6, -1),
        centroids[:1].expand(3, -1, -1),
        members[:1].expand(6, -1),
        grad[:1].expand(3, -1, -1),
    )
    assert_same(results(fused, *alike), results(fused, *(t.contiguous() for t in alike)))


def test_offsets_beyond_int32(draw: Callable[..., Inputs]) -> None:
    """Rows 2^30 elements apart; only the pages that hold them are ever touched."""
    query, centroids, members, _ = draw(1, 3, 4, 8)
    assert members is not None
    expected = fused(query, centroids, 2.0, members)
    for index, small in enumerate((query, members)):
        far = small.new_empty(2**31 + 8).as_strided(small.shape, (2**30, 1))
        far.copy_(small)
        moved = [query, centroids, 2.0, members]
        moved[3 * index] = far
        assert torch.equal(fused(*moved), expected)
        del far, moved


@pytest.mark.parametrize("masked", [False, True])
def test_every_output_element_is_written(draw: Callable[..., Inputs], masked: bool) -> None:
    inputs = draw(3, 6, 9, 130, masked=masked)
    expected = results(fused, *inputs, trained=2)
    with poisoned_allocations():
        assert_same(results(fused, *inputs, trained=2), expected)


def guarded(like: Tensor) -> tuple[Tensor, Tensor]:
    """Return an output and the elements that lie behind it."""
    flat = like.new_full((like.numel() + 4096,), 7.0)
    return flat[: like.numel()].view(like.shape), flat[like.numel() :]


def test_nothing_is_written_behind_the_outputs(draw: Callable[..., Inputs]) -> None:
    query, centroids, members, grad = draw(3, 6, 9, 130)
    assert members is not None
    gates, behind_gates = guarded(grad)
    dcentroids, behind_centroids = guarded(centroids)
    dquery, behind_query = guarded(query)
    inputs = (grad, gates, query, centroids, 2.0)
    kernels.forward_launch(query, centroids, 2.0, members.view(torch.uint8), gates).run()
    kernels.centroid_gradient_launch(*inputs, 2, dcentroids).run()
    kernels.query_gradient_launch(*inputs, dquery).run()
    found = {"gates": gates, "dquery": dquery, "dcentroids": dcentroids}
    assert_same(found, results(fused, query, centroids, members, grad, trained=2))
    assert all((rest == 7.0).all() for rest in (behind_gates, behind_centroids, behind_query))


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_only_the_gradients_asked_for_are_computed(
    draw: Callable[..., Inputs], needed: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    query, centroids, members, grad = draw(2, 5, 4, 12)
    expected = results(fused, query, centroids, members, grad)
    ran, run = [], Launch.run

    def counted(launch: Launch) -> None:
        ran.append(launch.arguments)
        run(launch)

    monkeypatch.setattr(Launch, "run", counted)
    leaves = [leaf.requires_grad_(need) for leaf, need in zip((query, centroids), needed, strict=True)]
    fused(*leaves, 2.0, members).backward(grad)
    assert len(ran) == 2
    for leaf, need, name in zip(leaves, needed, ("dquery", "dcentroids"), strict=True):
        assert torch.equal(leaf.grad, expected[name]) if need else leaf.grad is None


def test_forward_is_one_launch_of_all_layers(
    draw: Callable[..., Inputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    query, centroids, members, _ = draw(5, 6, 4, 12)
    ran: list[Launch] = []
    monkeypatch.setattr(Launch, "run", lambda launch: ran.append(launch))
    fused(query, centroids, 2.0, members)
    assert [launch.grid for launch in ran] == [(2, 5)]
    assert ran[0].moved_bytes == 4 * (6 * 12 + 5 * 4 * 12 + 5 * 6 * 4) + 6 * 4


def test_a_suffix_moves_fewer_bytes() -> None:
    suffix, full = (
        [launch.moved_bytes for launch in kernels.launches(4, 8, 6, 32, trained, masked=False)]
        for trained in (1, 6)
    )
    assert full[1] - suffix[1] == 4 * 5 * 32 * 4 and full[0] == suffix[0] and full[2] == suffix[2]


def test_float64_is_refused(draw: Callable[..., Inputs]) -> None:
    query, centroids, members, _ = draw(2, 3, 4, 5)
    with pytest.raises(NotImplementedError, match="centroid_gates cannot run 'triton' here: dtype must be"):
        fused(query, centroids.double(), 2.0, members)


@pytest.mark.parametrize("needs", [(True, True), (False, True)])
def test_operations_are_registered_whole(draw: Callable[..., Inputs], needs: tuple[bool, bool]) -> None:
    query, centroids, members, grad = draw(2, 3, 4, 5)
    gates = torch.ops.cram.centroid_gates.default(query, centroids, 2.0, members)
    torch.library.opcheck(torch.ops.cram.centroid_gates.default, (query, centroids, 2.0, members))
    backward = (grad, gates, query, centroids, 2.0, 1, *needs)
    torch.library.opcheck(torch.ops.cram.centroid_gates_backward.default, backward)


# The compiler itself instantiates autograd.Function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_whole_once_for_every_batch_size(draw: Callable[..., Inputs]) -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def whole(query: Tensor, centroids: Tensor, sigma: float, members: Tensor | None) -> Tensor:
        return fused(query, centroids, 2.0, members, trained=1)

    compiled = torch.compile(whole, fullgraph=True, dynamic=True, backend=counter)
    for samples in (3, 5, 9):
        inputs = draw(2, samples, 4, 8)
        assert_same(results(compiled, *inputs), results(whole, *inputs))
    assert counter.frame_count == 1


@pytest.mark.gpu
def test_two_runs_are_bitwise_equal() -> None:
    inputs = inputs_on(torch.device("cuda"), 32, 64, 64, 1024)
    assert_same(results(fused, *inputs), results(fused, *inputs))


@pytest.mark.gpu
def test_forward_and_backward_under_a_cuda_graph() -> None:
    query, centroids, members, grad = inputs_on(torch.device("cuda"), 8, 16, 10, 768)

    def step() -> tuple[Tensor, ...]:
        gates = torch.ops.cram.centroid_gates.default(query, centroids, 2.0, members)
        return gates, *torch.ops.cram.centroid_gates_backward.default(
            grad, gates, query, centroids, 2.0, 1, True, True
        )

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    query.add_(torch.randn_like(query))
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        assert torch.equal(found, expected)
