"""centroid_gates: values, gradients, membership, precision, and one gates tensor shared by many
checkpoints."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cram_kernels import centroid_gates, expert_lora
from cram_kernels.testing import layer_inputs
from tests.cram_kernels.devices import needs_cuda, needs_interpreter, needs_native

CPU = torch.device("cpu")
# Implementation, device, and the widest precision that it computes in.
every_impl = pytest.mark.parametrize(
    ("impl", "device", "dtype"),
    [
        pytest.param("reference", CPU, torch.float64, id="reference"),
        pytest.param("native", CPU, torch.float32, marks=needs_native, id="native"),
        pytest.param("triton", CPU, torch.float32, marks=needs_interpreter, id="triton-cpu"),
        pytest.param("triton", torch.device("cuda"), torch.float32, marks=needs_cuda, id="triton-cuda"),
    ],
)


def draw(
    layers: int,
    samples: int,
    experts: int,
    width: int,
    seed: int = 0,
    *,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(samples, width, generator=generator, dtype=torch.float64)
    centroids = torch.randn(layers, experts, width, generator=generator, dtype=torch.float64)
    return query.to(device, dtype), centroids.to(device, dtype)


def formula(query: Tensor, centroids: Tensor, sigma: float, members: Tensor | None = None) -> Tensor:
    """Distances by direct differences; rows without members become zero."""
    differences = query[None, :, None] - centroids[:, None]
    logits = -differences.square().sum(-1) / (2 * sigma**2)
    if members is not None:
        logits = logits.masked_fill(~members, -torch.inf)
    return logits.softmax(-1).nan_to_num(0.0)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*(st.integers(low, 6) for low in (0, 0, 1, 1))),
    sigma=st.floats(0.5, 4),
    masked=st.booleans(),
    frozen=st.integers(0, 6),
    seed=st.integers(0, 9),
)
def test_formula_and_gradients(
    shape: tuple[int, int, int, int], sigma: float, masked: bool, frozen: int, seed: int
) -> None:
    query, centroids = (leaf.requires_grad_() for leaf in draw(*shape, seed=seed))
    members = torch.rand(shape[1], shape[2]) > 0.4 if masked else None
    frozen = min(frozen, shape[2])
    gates = centroid_gates(query, centroids, sigma, members, trained=shape[2] - frozen, impl="reference")
    expected = formula(query, centroids, sigma, members)
    torch.testing.assert_close(gates, expected)
    functional = torch.randn(gates.shape, dtype=torch.float64)
    found = torch.autograd.grad(gates, (query, centroids), functional)
    wanted = torch.autograd.grad(expected.clone(), (query, centroids), functional)
    assert not found[1][:, :frozen].any()
    wanted[1][:, :frozen] = 0
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


@needs_native
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 9), st.integers(1, 200)),
    sigma=st.floats(0.5, 4),
    masked=st.booleans(),
    seed=st.integers(0, 9),
)
def test_native_gates_are_the_formula(
    shape: tuple[int, int, int, int], sigma: float, masked: bool, seed: int
) -> None:
    query, centroids = draw(*shape, seed=seed, dtype=torch.float32)
    members = torch.rand(shape[1], shape[2]) > 0.4 if masked else None
    gates = centroid_gates(query, centroids, sigma, members, impl="native")
    expected = formula(query.double(), centroids.double(), sigma, members).float()
    torch.testing.assert_close(gates, expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize(
    "impl",
    [pytest.param("native", marks=needs_native), pytest.param("triton", marks=needs_interpreter)],
)
@pytest.mark.parametrize("masked", [False, True])
def test_gates_do_not_depend_on_the_other_samples(impl: str, masked: bool) -> None:
    """In no bit: neither on their number, nor on their queries and members."""
    query, centroids = draw(2, 5, 7, 70, dtype=torch.float32)
    members = torch.rand(5, 7) > 0.4 if masked else None
    together = centroid_gates(query, centroids, 2.0, members, impl=impl)
    for sample in range(5):
        own = None if members is None else members[sample : sample + 1]
        alone = centroid_gates(query[sample : sample + 1], centroids, 2.0, own, impl=impl)
        assert torch.equal(alone[:, 0], together[:, sample])


@needs_native
def test_native_gates_are_the_same_in_each_number_of_threads() -> None:
    query, centroids = draw(6, 16, 40, 768, dtype=torch.float32)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 4, 8):
            torch.set_num_threads(count)
            found.append(centroid_gates(query, centroids, 20.0, impl="native"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gates, found[0]) for gates in found)


def test_gradcheck() -> None:
    query, centroids = draw(2, 3, 4, 5)
    members = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]]).bool()
    leaves = (query.requires_grad_(), centroids.requires_grad_())
    assert torch.autograd.gradcheck(lambda q, c: centroid_gates(q, c, 1.5, members, impl="reference"), leaves)


@every_impl
def test_members_select_exactly(impl: str, device: torch.device, dtype: torch.dtype) -> None:
    """Others get exactly 0 and no gradient, NaN of an expert outside included; an empty row is all zeros."""
    query, centroids = draw(3, 4, 5, 8, device=device, dtype=torch.float32)
    members = torch.tensor(
        [[1, 1, 0, 0, 1], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [1, 1, 0, 1, 1]], device=device
    ).bool()
    expected = formula(query, centroids, 2.0, members)
    centroids[:, 2] = torch.nan
    gates = centroid_gates(query.requires_grad_(), centroids.requires_grad_(), 2.0, members, impl=impl)
    torch.testing.assert_close(gates, expected)
    assert (gates[:, ~members] == 0).all() and (gates[:, 2, 1] == 1).all()
    grad = torch.randn(gates.shape, device=device).masked_fill(~members, torch.nan)
    dquery, dcentroids = torch.autograd.grad(gates, (query, centroids), grad)
    assert dquery.isfinite().all() and dcentroids[:, [0, 1, 3, 4]].isfinite().all()
    assert not dquery[1].any() and not dquery[2].any()


@every_impl
@pytest.mark.parametrize("corrupt", ["centroid", "query"])
def test_what_is_corrupt_stays_its_own(
    impl: str, device: torch.device, dtype: torch.dtype, corrupt: str
) -> None:
    """NaN in a centroid or a query reaches the samples that use it and their experts, no others."""
    query, centroids = draw(2, 3, 5, 8, device=device, dtype=dtype)
    members = torch.tensor([[1, 0, 0, 1, 0], [0, 1, 1, 0, 1], [0, 1, 0, 0, 1]], device=device).bool()
    grad = torch.randn(2, 3, 5, dtype=dtype, device=device)

    def run() -> tuple[Tensor, ...]:
        leaves = query.clone().requires_grad_(), centroids.clone().requires_grad_()
        gates = centroid_gates(*leaves, 2.0, members, impl=impl)
        dquery, dcentroids = torch.autograd.grad(gates, leaves, grad)
        return gates[:, 1:].detach(), dquery[1:], dcentroids[:, [1, 2, 4]]

    expected = run()
    if corrupt == "centroid":
        centroids[:, 3] = torch.nan
    else:
        query[0] = torch.nan
    torch.testing.assert_close(run(), expected)


@every_impl
@pytest.mark.parametrize("shape", [(2, 3, 0, 5), (2, 0, 4, 5), (0, 3, 4, 5)])
def test_nothing_to_route(
    impl: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    """No expert, no sample, no layer: gates without elements, gradients of zeros."""
    query, centroids = (leaf.requires_grad_() for leaf in draw(*shape, device=device, dtype=dtype))
    gates = centroid_gates(query, centroids, 2.0, impl=impl)
    assert gates.shape == (shape[0], shape[1], shape[2])
    for grad, leaf in zip(
        torch.autograd.grad(gates.sum(), (query, centroids)), (query, centroids), strict=True
    ):
        assert torch.equal(grad, torch.zeros_like(leaf))


@every_impl
@pytest.mark.parametrize("norm", [1.0, 60.0])
def test_precision_at_large_norms(impl: str, device: torch.device, dtype: torch.dtype, norm: float) -> None:
    """float32 gates err at most twice as much as direct differences; the expanded form far more."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    base = normal(768)
    base *= norm / base.norm()
    query = base + normal(8, 768) * 0.1
    centroids = base + normal(4, 6, 768) * 0.1
    exact = formula(query.double(), centroids.double(), 2.0)

    def error(gates: Tensor) -> float:
        return float((gates.double() - exact).abs().max())

    eps = torch.finfo(torch.float32).eps
    limit = 2 * error(formula(query, centroids, 2.0)) + eps
    assert error(centroid_gates(query, centroids, 2.0, impl=impl)) <= limit
    far = torch.cat([centroids, normal(4, 2, 768) * norm], 1)
    members = torch.tensor([True] * 6 + [False] * 2, device=device).expand(8, -1)
    assert error(centroid_gates(query, far, 2.0, members, impl=impl)[..., :6]) <= limit
    if norm == 60:
        squares = query.square().sum(-1)[None, :, None] + centroids.square().sum(-1)[:, None]
        expanded = (-(squares - 2 * query @ centroids.mT) / 8).softmax(-1)
        assert error(expanded) > 20 * error(centroid_gates(query, centroids, 2.0, impl=impl))


@every_impl
def test_saturated_softmax(impl: str, device: torch.device, dtype: torch.dtype) -> None:
    query, centroids = (30 * t for t in draw(2, 4, 5, 64, device=device, dtype=torch.float32))
    centroids[:, 0] = query[0]
    centroids.requires_grad_()
    gates = centroid_gates(query, centroids, 2.0, impl=impl)
    assert (gates[:, 0] == torch.eye(5, device=device)[0]).all()
    (grad,) = torch.autograd.grad(gates, centroids, torch.randn(gates.shape, device=device))
    assert gates.isfinite().all() and grad.isfinite().all()


@every_impl
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_and_autocast(
    impl: str, device: torch.device, dtype: torch.dtype, half: torch.dtype
) -> None:
    query, centroids = draw(2, 3, 4, 16, device=device, dtype=half)
    expected = formula(query.double(), centroids.double(), 2.0).float()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        gates = centroid_gates(query, centroids, 2.0, impl=impl)
    assert gates.dtype == torch.float32
    torch.testing.assert_close(gates, expected)


# The compiler itself instantiates autograd.Function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@every_impl
def test_compiles_whole(impl: str, device: torch.device, dtype: torch.dtype) -> None:
    query, centroids = (t.requires_grad_() for t in draw(2, 3, 4, 8, device=device, dtype=dtype))

    def eager(q: Tensor, c: Tensor) -> Tensor:
        return centroid_gates(q, c, 2.0, impl=impl)

    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    grads = [
        torch.autograd.grad(f(query, centroids).square().sum(), (query, centroids)) for f in (compiled, eager)
    ]
    torch.testing.assert_close(*grads)


def reentrant(layer: Callable[..., Tensor], *arguments: Any) -> Tensor:
    return checkpoint(layer, *arguments, use_reentrant=True, preserve_rng_state=False)


def unreentrant(layer: Callable[..., Tensor], *arguments: Any) -> Tensor:
    return checkpoint(layer, *arguments, use_reentrant=False)


@every_impl
@pytest.mark.parametrize("wrap", [reentrant, unreentrant])
def test_one_gates_tensor_feeds_many_checkpoints(
    wrap: Callable[..., Tensor], impl: str, device: torch.device, dtype: torch.dtype
) -> None:
    """Each reentrant checkpoint runs its own backward pass through the shared gates."""
    inputs = layer_inputs(in_features=20, out_features=20, dtype=dtype)
    experts = inputs.experts()
    query, rows = draw(3, 4, 4, 8, device=device, dtype=dtype)
    trained = rows[:, -1].clone().requires_grad_()

    def model(call: Callable[..., Tensor]) -> list[Tensor]:
        centroids = torch.cat([rows[:, :-1], trained[:, None]], 1)
        gates = centroid_gates(query, centroids, 2.0, trained=1, impl=impl).cpu()
        x = hidden = inputs.x.clone().requires_grad_()
        for index in range(3):
            hidden = call(
                lambda h, i: expert_lora(
                    h, inputs.weight, inputs.bias, experts, gates[i], impl="reference"
                ).tanh(),
                hidden,
                index,
            )
        trained.grad = None
        experts.zero_grad()
        hidden.square().sum().backward()
        return [x.grad, trained.grad, experts.trained_a.grad]

    torch.testing.assert_close(model(wrap), model(lambda layer, *arguments: layer(*arguments)))


@every_impl
def test_two_backward_passes_add_up(impl: str, device: torch.device, dtype: torch.dtype) -> None:
    query, centroids = (t.requires_grad_() for t in draw(2, 3, 4, 8, device=device, dtype=dtype))
    gates = centroid_gates(query, centroids, 2.0, impl=impl)
    gates[0].square().sum().backward()
    gates[1].square().sum().backward()
    expected = torch.autograd.grad(formula(query, centroids, 2.0).square().sum(), (query, centroids))
    torch.testing.assert_close((query.grad, centroids.grad), expected)


@every_impl
@pytest.mark.parametrize("which", [0, 1, 2])
def test_change_between_forward_and_backward_raises(
    which: int, impl: str, device: torch.device, dtype: torch.dtype
) -> None:
    query, centroids = (t.requires_grad_() for t in draw(2, 3, 4, 8, device=device, dtype=dtype))
    gates = centroid_gates(query, centroids, 2.0, impl=impl)
    with torch.no_grad():
        (query, centroids, gates)[which].add_(1)
    with pytest.raises(RuntimeError, match="must not change in place"):
        gates.sum().backward()


@every_impl
def test_second_derivative_raises(impl: str, device: torch.device, dtype: torch.dtype) -> None:
    query, centroids = (t.requires_grad_() for t in draw(2, 3, 4, 8, device=device, dtype=dtype))
    gates = centroid_gates(query, centroids, 2.0, impl=impl)
    (grad,) = torch.autograd.grad(gates.square().sum(), centroids, create_graph=True)
    with pytest.raises(RuntimeError, match="must be differentiated once"):
        grad.sum().backward()


# vmap calls an operation without a rule for batches once per gradient, and says so.
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("trained", [None, 2])
@every_impl
def test_a_batch_of_gradients_is_gradient_after_gradient(
    impl: str, device: torch.device, dtype: torch.dtype, trained: int | None
) -> None:
    leaves = [each.requires_grad_() for each in draw(2, 3, 4, 8, device=device, dtype=dtype)]
    grads = draw(5, 1, 2 * 3, 4, device=device, dtype=dtype)[1].view(5, 2, 3, 4)
    ones = [
        torch.autograd.grad(centroid_gates(*leaves, 3.0, trained=trained, impl=impl), leaves, grad)
        for grad in grads
    ]
    gates = centroid_gates(*leaves, 3.0, trained=trained, impl=impl)
    found = torch.autograd.grad(gates, leaves, grads, is_grads_batched=True)
    torch.testing.assert_close(found, tuple(map(torch.stack, zip(*ones, strict=True))))


@every_impl
def test_graph_is_freed_without_the_collector(impl: str, device: torch.device, dtype: torch.dtype) -> None:
    query, centroids = (t.requires_grad_() for t in draw(2, 3, 4, 8, device=device, dtype=dtype))
    gates = centroid_gates(query, centroids, 2.0, impl=impl)
    alive = weakref.ref(gates.grad_fn)
    gc.disable()
    try:
        del gates
        assert alive() is None
    finally:
        gc.enable()


Q, C = torch.zeros(3, 8), torch.zeros(2, 4, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Q[0], C, 2.0), r"\[S, D_q\] and \[L, E, D_q\], got \[8\] and \[2, 4, 8\]"),
        ((Q, C[0], 2.0), r"got \[3, 8\] and \[4, 8\]"),
        ((Q[:, 1:], C, 2.0), r"got \[3, 7\] and \[2, 4, 8\]"),
        ((Q.int(), C, 2.0), "must be floating point, got torch.int32"),
        ((Q, C, 0.0), "sigma must be positive, got 0.0"),
        ((Q, C, float("nan")), "sigma must be positive, got nan"),
        ((Q, C, 2.0, torch.ones(3, 4)), r"members must be bool \[3, 4\], got torch.float32"),
        ((Q, C, 2.0, torch.ones(4, 3).bool()), r"members must be bool \[3, 4\], got torch.bool \[4, 3\]"),
    ],
)
def test_refusals(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        centroid_gates(*arguments)
    with pytest.raises(NotImplementedError, match="centroid_gates has no 'cpu'"):
        centroid_gates(Q, C, 2.0, impl="cpu")


@pytest.mark.parametrize("trained", [-1, 5])
def test_refuses_a_suffix_that_is_not_there(trained: int) -> None:
    with pytest.raises(ValueError, match=f"trained must be between 0 and E=4, got {trained}"):
        centroid_gates(Q, C, 2.0, trained=trained)


@pytest.mark.parametrize("query_of_inference", [False, True])
def test_inference_mode(query_of_inference: bool) -> None:
    """Gates can be made in inference mode, and trained against a query that was encoded in it."""
    centroids = torch.randn(2, 3, 8).requires_grad_(query_of_inference)
    with torch.inference_mode():
        query = torch.randn(4, 8)
        expected = centroid_gates(query, centroids, 2.0)
    if query_of_inference:
        gates = centroid_gates(query, centroids, 2.0)
        torch.testing.assert_close(gates, expected.clone())
        gates[..., 0].sum().backward()
        assert centroids.grad.abs().sum() > 0
