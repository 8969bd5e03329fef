"""The CUDA source itself, run on the CPU thread by thread against the float64 oracle.

Covers indices, bounds, barriers, strides and the order of launches; what it cannot show is named in
`tests/csrc/emulation/cuda_runtime.h`. On a GPU the same cases run in `test_orthogonality_native.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cram_kernels.testing import assert_within_budget, poisoned_allocations
from csrc import build
from tests.cram_kernels.penalties import MIXED, Penalty, penalty_inputs, run_impl, run_oracle
from tests.csrc.emulation import emulated_library

SOURCE = build.HERE / "orthogonality/cuda.cu"
# Beyond one slice of the long axis, one tile of rows, one chunk of weights, one block of each kernel.
LARGE = ((1100, 8, 3, 33), (8, 2100, 17, 5), (600, 40, 9, 300), (40, 1028, 8, 64))
SMALL_TABLE = {"kModules = CUDART_VERSION >= 12010 ? 224 : 28": "kModules = 3"}
NAMES = ("loss", "dhidden", "dtrained_a", "dtrained_b", "dgamma")


@pytest.fixture(scope="module")
def operation(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Tensor, ...]]:
    """The emulated operation, with a table so small that several are needed."""
    return load(tmp_path_factory.mktemp("emulated"), "cram_emulated", SMALL_TABLE)


def load(folder: Path, name: str, changes: dict[str, str]) -> Callable[..., tuple[Tensor, ...]]:
    try:
        build.find_compiler()
    except build.Unavailable as reason:
        pytest.skip(str(reason))
    torch.ops.load_library(str(emulated_library(SOURCE, folder, name, changes)))
    return getattr(torch.ops, name).orthogonality_penalty


def run(operation: Callable[..., tuple[Tensor, ...]], p: Penalty, *wanted: bool) -> dict[str, Tensor]:
    """The operation's results by the names of `run_impl`, in float32."""
    lists = (p.hidden, p.trained_a, p.trained_b, p.bases)
    with poisoned_allocations():
        found = operation(*lists, torch.cat(p.gamma), p.mask, p.scale, *(wanted or (True,) * 4))
    return dict(zip(NAMES, found, strict=True))


def expected(p: Penalty) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What plain PyTorch and the oracle find; the pooled hidden states stand for the tokens."""
    if p.mask is not None:
        share = p.mask / p.mask.sum(1, keepdim=True).clamp(min=1)
        means = [torch.einsum("bt,btd->bd", share.double(), h.double()) for h in p.hidden]
        pooled = replace(p, hidden=means, mask=None)
        plain = replace(pooled, hidden=[mean.float() for mean in means])
    else:
        pooled = plain = p
    plain = replace(plain.map(torch.Tensor.float), gamma=p.gamma)
    return run_impl(plain, "reference"), run_oracle(pooled)


def with_history(p: Penalty) -> Penalty:
    """Without the modules that have no basis: the operation is never given one."""
    kept = [m for m, basis in enumerate(p.bases) if basis.shape[1]]
    names = ("hidden", "trained_a", "trained_b", "bases", "gamma")
    return replace(p, **{name: [getattr(p, name)[m] for m in kept] for name in names})


@pytest.mark.parametrize("tokens", [0, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shapes", "batch"), [(MIXED, 5), (MIXED, 1), (LARGE, 9)])
def test_source_computes_the_formula(
    operation: Callable[..., tuple[Tensor, ...]],
    shapes: tuple[tuple[int, int, int, int], ...],
    batch: int,
    dtype: torch.dtype,
    tokens: int,
) -> None:
    inputs = with_history(penalty_inputs(shapes, batch, tokens)).to(dtype)
    assert_within_budget(run(operation, inputs), *expected(inputs))


def test_unwanted_gradients_are_empty_and_the_others_the_same(
    operation: Callable[..., tuple[Tensor, ...]],
) -> None:
    inputs = with_history(penalty_inputs()).to(torch.float32)
    everything = run(operation, inputs)
    for i in range(4):
        one = run(operation, inputs, *(j == i for j in range(4)))
        assert torch.equal(one["loss"], everything["loss"])
        for j, name in enumerate(NAMES[1:]):
            assert torch.equal(one[name], everything[name]) if j == i else not one[name].numel()


def test_masked_tokens_are_not_read_and_empty_samples_count_nothing(
    operation: Callable[..., tuple[Tensor, ...]],
) -> None:
    inputs = with_history(penalty_inputs(tokens=7)).to(torch.float32)
    assert inputs.mask is not None
    inputs.mask[1] = False
    clean = run(operation, inputs)
    for tokens in inputs.hidden:
        tokens[~inputs.mask] = float("nan")
    found = run(operation, inputs)
    assert all(torch.equal(found[name], clean[name]) and found[name].isfinite().all() for name in NAMES)
    starts = torch.arange(len(inputs.gamma)) * 5
    assert (found["dgamma"][starts + 1] == 0).all() and (found["dgamma"][starts] > 0).any()


def test_memory_that_is_not_aligned(operation: Callable[..., tuple[Tensor, ...]]) -> None:
    """Rows of four elements that start between two boundaries: the bits do not change."""
    inputs = with_history(penalty_inputs()).to(torch.float32)

    def shift(tensor: Tensor) -> Tensor:
        rows = tensor.t() if tensor.dim() == 2 and tensor.stride(0) == 1 else tensor
        moved = torch.empty(rows.numel() + 1)[1:].view(rows.shape).copy_(rows)
        return moved.t() if rows is not tensor else moved

    found, moved = run(operation, inputs), run(operation, inputs.map(shift))
    assert all(torch.equal(found[name], moved[name]) for name in NAMES)


@pytest.mark.parametrize(
    "changes",
    [
        {"i < nx; i += kRows) {\n    __syncthreads();\n": "i < nx; i += kRows) {\n"},
        {"    });\n    __syncthreads();\n": "    });\n"},
        {"losses[blockIdx.x] = loss;": "losses[0] = loss;"},
        {"const int d = start + 4 * threadIdx.x;": "const int d = 4 * threadIdx.x;"},
    ],
    ids=["barrier_before_fill", "barrier_after_fill", "losses_collide", "slice_start"],
)
def test_emulation_finds_a_planted_fault(
    changes: dict[str, str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    broken = load(tmp_path, f"cram_{request.node.callspec.id}", changes)
    inputs = with_history(penalty_inputs(LARGE, 9)).to(torch.float32)
    with pytest.raises(AssertionError):
        assert_within_budget(run(broken, inputs), *expected(inputs))
