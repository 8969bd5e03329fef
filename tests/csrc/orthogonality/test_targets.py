"""The penalty on each instruction set that it is compiled for, not only this machine's best."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cram_kernels.testing import assert_within_budget
from tests.cram_kernels.penalties import MIXED, penalty_inputs, run_impl, run_oracle
from tests.csrc.narrowed import ANY, AVX512, narrowed_library, require_target

NAMES = ("loss", "dhidden", "dtrained_a", "dtrained_b", "dgamma")
FULL = tuple(shape for shape in MIXED if shape[3])
# What the library must believe of the CPU, by the set that it then takes.
BELIEFS = {target: {text: f"false && {text}"} for target, text in (("avx2", AVX512), ("baseline", ANY))}


@pytest.mark.parametrize("target", BELIEFS)
def test_every_instruction_set(target: str, tmp_path: Path) -> None:
    require_target(target)
    library = narrowed_library(tmp_path, f"cram_{target}", BELIEFS[target], ["orthogonality/cpu.cpp"])
    torch.ops.load_library(str(library))
    operation = getattr(torch.ops, f"cram_{target}").orthogonality_penalty
    p = penalty_inputs(FULL * 3).to(torch.float32)
    lists = (p.hidden, p.trained_a, p.trained_b, p.bases)
    found = operation(*lists, torch.cat(p.gamma), None, p.scale, True, True, True, True)
    assert_within_budget(dict(zip(NAMES, found, strict=True)), run_impl(p, "reference"), run_oracle(p))
