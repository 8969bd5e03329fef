"""The native orthogonality_penalty: budget, gradients on request, compilation, refusals; CPU and GPU."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cram_kernels import native_libraries, orthogonality_penalty
from cram_kernels.orthogonality import api
from cram_kernels.testing import assert_within_budget, poisoned_allocations
from tests.cram_kernels.penalties import GRADIENTS, MIXED, Penalty, penalty_inputs, run_impl, run_oracle

_MISSING = native_libraries()
pytestmark = pytest.mark.skipif(_MISSING["cpu"] is not None, reason=str(_MISSING["cpu"]))
_NO_CUDA = pytest.mark.skipif(_MISSING["cuda"] is not None, reason=str(_MISSING["cuda"]))
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, _NO_CUDA])]
# One more module than the CUDA table holds, so that a second launch is needed.
MANY = ((8, 12, 2, 3),) * 225
WIDE = ((1100, 520, 3, 33), (520, 2100, 17, 5), (4096, 4096, 8, 64))


def place(inputs: Penalty, device: str) -> Penalty:
    """The same call on a device, the bases' layout kept."""
    moved = inputs.map(lambda tensor: tensor.to(device))
    return replace(moved, mask=None if inputs.mask is None else inputs.mask.to(device))


def host(results: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in results.items()}


def check(inputs: Penalty, device: str) -> None:
    with poisoned_allocations():
        found = host(run_impl(place(inputs, device), "native"))
    assert_within_budget(found, run_impl(inputs, "reference"), run_oracle(inputs))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [0, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 5])
def test_ragged_modules(batch: int, dtype: torch.dtype, tokens: int, device: str) -> None:
    # A budget compares largest errors: of few values they would be luck.
    check(penalty_inputs(MIXED * 4, batch, tokens).to(dtype), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shapes", [MANY, WIDE], ids=["many", "wide"])
def test_sizes(shapes: tuple[tuple[int, int, int, int], ...], device: str) -> None:
    check(penalty_inputs(shapes, 3).to(torch.float32), device)


def test_float32_experts_on_half_hidden_states() -> None:
    """The precisions of training: tokens in bfloat16, experts and bases in float32."""
    half, single = penalty_inputs(tokens=6).to(torch.bfloat16), penalty_inputs(tokens=6).to(torch.float32)
    check(replace(single, hidden=half.hidden), "cpu")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "wanted", [names for n in range(4) for names in itertools.combinations(GRADIENTS, n)], ids="-".join
)
def test_gradients_on_request(wanted: tuple[str, ...], device: str) -> None:
    inputs = place(penalty_inputs().to(torch.float32), device)
    some, everything = run_impl(inputs, "native", wanted), run_impl(inputs, "native")
    assert all(torch.equal(value, everything[name]) for name, value in some.items())


@pytest.mark.parametrize("device", DEVICES)
def test_masked_tokens_are_not_read_and_empty_samples_count_nothing(device: str) -> None:
    inputs = place(penalty_inputs(tokens=7).to(torch.float32), device)
    assert inputs.mask is not None
    inputs.mask[1] = False
    clean = run_impl(inputs, "native")
    for tokens in inputs.hidden:
        tokens[~inputs.mask] = float("nan")
    found = run_impl(inputs, "native")
    assert all(torch.equal(found[name], clean[name]) and found[name].isfinite().all() for name in found)
    nobody = replace(inputs, mask=torch.zeros_like(inputs.mask))
    assert all((value == 0).all() for value in run_impl(nobody, "native").values())


@pytest.mark.parametrize("device", DEVICES)
def test_runs_are_bitwise_equal_whatever_the_threads(device: str) -> None:
    inputs = place(penalty_inputs(MANY, 3).to(torch.float32), device)
    first = run_impl(inputs, "native")
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = run_impl(inputs, "native")
            assert all(torch.equal(again[name], first[name]) for name in first)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("device", DEVICES)
def test_strided_inputs(device: str) -> None:
    inputs = penalty_inputs().to(torch.float32)

    def stride(tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(2, -1)[..., ::2] if tensor.numel() else tensor

    found = run_impl(place(inputs, device).map(stride), "native")
    expected = run_impl(place(inputs, device), "native")
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_auto_takes_native_but_float64() -> None:
    single = penalty_inputs().to(torch.float32)
    assert torch.equal(run_impl(single, "auto")["loss"], run_impl(single, "native")["loss"])
    assert run_impl(penalty_inputs(), "auto")["loss"].dtype == torch.float64
    with pytest.raises(NotImplementedError, match="cannot run 'native' here: dtype must be one of .*float64"):
        run_impl(penalty_inputs(), "native")
    assert "must be on a CPU or CUDA device, got meta" in str(
        api.OP.why_missing("native", torch.device("meta"), torch.float32)
    )


def loss_of(inputs: Penalty) -> Tensor:
    lists = (inputs.hidden, inputs.trained_a, inputs.trained_b, inputs.bases, inputs.gamma)
    return orthogonality_penalty(*lists, scale=2.0, mask=inputs.mask, impl="native")


def test_second_derivative_and_second_backward_raise() -> None:
    inputs = penalty_inputs().to(torch.float32)
    a = inputs.trained_a[0].requires_grad_()
    with pytest.raises(RuntimeError, match="must not be differentiated twice under impl='native'"):
        torch.autograd.grad(loss_of(inputs), a, create_graph=True)
    loss = loss_of(inputs)
    loss.backward(retain_graph=True)
    once = a.grad.clone()
    loss.backward()
    assert torch.equal(a.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_an_earlier_backward_leaves_later_ones_and_held_gradients_alone() -> None:
    inputs = penalty_inputs().to(torch.float32)
    leaves = [t.requires_grad_() for t in (*inputs.trained_a, *inputs.hidden, *inputs.gamma)]
    loss = loss_of(inputs)
    first = torch.autograd.grad(-3 * loss, leaves, retain_graph=True, materialize_grads=True)
    held = [each.clone() for each in first]
    second = torch.autograd.grad(loss, leaves, materialize_grads=True)
    for before, after, other in zip(held, first, second, strict=True):
        assert torch.equal(before, after) and torch.equal(before, -3 * other)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_can_be_clipped_and_accumulated(device: str) -> None:
    """They lie in one buffer; neither writes outside its own."""
    inputs = place(penalty_inputs().to(torch.float32), device)
    a = [each.requires_grad_() for each in inputs.trained_a]
    loss_of(inputs).backward()
    with torch.no_grad():
        once = [each.grad.clone() if each.grad is not None else None for each in a]
        for each in a[1:]:
            if each.grad is not None:
                each.grad.fill_(float("nan"))
    assert once[0].any() and torch.equal(a[0].grad, once[0])
    loss_of(inputs).backward()
    assert torch.equal(a[0].grad, 2 * once[0])


# vmap calls an operation without a rule for batches once per gradient, and says so.
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("tokens", [0, 5])
def test_a_batch_of_gradients_is_gradient_after_gradient(tokens: int) -> None:
    inputs = penalty_inputs(tokens=tokens).to(torch.float32)
    lists = (inputs.trained_a, inputs.trained_b, inputs.hidden)
    leaves = [t.requires_grad_() for each in lists for t in (each[0], each[2], each[6])]
    grads = torch.tensor([1.0, -2.0, 0.5])
    ones = [torch.autograd.grad(loss_of(inputs), leaves, grad) for grad in grads]
    for keep in (True, False):
        loss = loss_of(inputs)
        found = torch.autograd.grad(loss, leaves, grads, is_grads_batched=True, retain_graph=keep)
        torch.testing.assert_close(found, tuple(map(torch.stack, zip(*ones, strict=True))))


def test_gradient_is_multiplied_by_what_comes_in() -> None:
    inputs = penalty_inputs().to(torch.float32)
    a = inputs.trained_a[0].requires_grad_()
    plain, scaled = (torch.autograd.grad(f(loss_of(inputs)), a)[0] for f in (lambda x: x, lambda x: -4 * x))
    assert torch.equal(scaled, -4 * plain) and plain.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [0, 4])
def test_opcheck(tokens: int, device: str) -> None:
    p = place(penalty_inputs(MIXED[:3], 2, tokens).to(torch.float32), device)
    api.OP.select("native", torch.device(device), torch.float32)
    arguments = (p.hidden, p.trained_a, p.trained_b, p.bases, torch.cat(p.gamma), p.mask, 2.0)
    for wanted in ((True, True, True, True), (False, True, False, True)):
        torch.library.opcheck(torch.ops.cram.orthogonality_penalty.default, (*arguments, *wanted))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_whole() -> None:
    inputs = penalty_inputs(MIXED[:3], 2, 4).to(torch.float32)
    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    leaves = [leaf for name in GRADIENTS for leaf in getattr(inputs, name)]
    for leaf in leaves:
        leaf.requires_grad_()
    results = [(loss, *torch.autograd.grad(loss, leaves)) for loss in (loss_of(inputs), compiled(inputs))]
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bt": lambda p: p.trained_b[:1]}, "equally long and not empty, got 2, 2, 1 and 2"),
        ({"a": lambda p: [p.trained_a[0].double(), p.trained_a[1]]}, "a must be float32, bfloat16 or"),
        ({"a": lambda p: [p.trained_a[0][0], p.trained_a[1]]}, "a must have 2 dimensions, got 1"),
        ({"bases": lambda p: [p.bases[0][1:], p.bases[1]]}, "module 0: hidden, a, bt and bases must fit"),
        ({"gamma": lambda p: torch.ones(9)}, "one value a sample of each module, 10, got 9"),
        ({"mask": lambda p: torch.ones(5, 4)}, "mask must be bool"),
        ({"mask": lambda p: torch.ones(5, 3, dtype=torch.bool)}, r"module 0: hidden must be \[B, T, D_in\]"),
    ],
)
def test_the_operation_itself_refuses(changes: dict, message: str) -> None:
    tokens = 4 if "mask" in changes else 0
    p = penalty_inputs(MIXED[:2], 5, tokens).to(torch.float32)
    arguments = dict(hidden=p.hidden, a=p.trained_a, bt=p.trained_b, bases=p.bases, gamma=torch.cat(p.gamma))
    arguments |= {"mask": p.mask} | {name: change(p) for name, change in changes.items()}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.cram.orthogonality_penalty(*arguments.values(), 2.0, True, True, True, True)
