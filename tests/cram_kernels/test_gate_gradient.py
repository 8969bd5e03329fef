"""How the gate gradient's launches cut their work: linear in tokens and packed rows, no program alone."""

from __future__ import annotations

import math

import pytest
import torch

from cram_kernels.launch import Launch

kernels = pytest.importorskip("cram_kernels.expert_lora.kernels.gate_gradient", exc_type=ImportError)
gating = pytest.importorskip("cram_kernels.expert_lora.kernels.gating", exc_type=ImportError)


def launches(tokens: int, samples: int, experts: int, mapped: bool = False) -> list[Launch]:
    """The launches for experts of rank 8, on tensors without memory."""
    rows = 8 * experts
    with torch.device("meta"):
        z, out, owner = torch.empty(tokens, rows), torch.empty(samples, experts), torch.empty(rows)
        segments = torch.empty(tokens, dtype=torch.int64) if mapped else None
        return kernels.gate_gradient(z, z, out, gating.gating(out, (owner,), segments, 1.0))


def passes(found: list[Launch]) -> int:
    """Passes of a loop over all programs."""
    return sum(math.prod(launch.grid) * launch.steps for launch in found)


@pytest.mark.parametrize(("samples", "mapped"), [(1, False), (8, True)])
def test_no_program_walks_all_tokens(samples: int, mapped: bool) -> None:
    """One sample, or a map of tokens to samples, must not leave the machine to a few programs."""
    first, _ = launches(8192, samples, 10, mapped)
    walked = first.steps * first.constants["BLOCK_T"]
    assert walked <= kernels.LEAST_SLAB and first.grid[2] * walked >= 8192


def test_work_is_linear_in_experts_and_tokens() -> None:
    few = passes(launches(2048, 8, 64))
    assert passes(launches(2048, 8, 640)) <= 10 * few
    assert passes(launches(20480, 8, 64)) <= 10 * few
