"""Each instruction set that the CPU kernels are compiled for is run, not only this machine's widest."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest
import torch

from cram_kernels.testing import assert_within_budget
from csrc import build
from tests.cram_kernels.penalties import MIXED, penalty_inputs, run_impl, run_oracle

NAMES = ("loss", "dhidden", "dtrained_a", "dtrained_b", "dgamma")
FULL = tuple(shape for shape in MIXED if shape[3])
# What the library must believe of the CPU, by the set that it then takes.
BELIEFS = {"avx2": ('__builtin_cpu_supports("avx512f")',), "baseline": ("__builtin_cpu_supports(",)}


def narrowed_library(folder: Path, target: str) -> Path:
    """Compile the penalty's CPU kernel such that it takes `target`; its namespace is cram_<target>."""
    for path in build.sources(".h", ".cpp"):
        text = path.read_text(encoding="utf-8").replace("(cram, ", f"(cram_{target}, ")
        if path.name == "vector.h":
            for belief in BELIEFS[target]:
                assert belief in text
                text = text.replace(belief, f"false && {belief}")
        (folder / path.name).write_text(text, encoding="utf-8")
    torch_root, library = build.torch_folder(), folder / f"{target}.so"
    command = [build.find_compiler(), *build.CXX_FLAGS, "-w", *build.DEFINES, f"-I{torch_root / 'include'}"]
    files = [str(folder / "ops.cpp"), str(folder / "orthogonality.cpp")]
    link = [f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-o", str(library)]
    subprocess.run([*command, "-shared", *files, *link], check=True)
    return library


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other architectures have one instruction set")
@pytest.mark.parametrize("target", BELIEFS)
def test_every_instruction_set(target: str, tmp_path: Path) -> None:
    try:
        build.find_compiler()
    except build.Unavailable as reason:
        pytest.skip(str(reason))
    if target == "avx2" and "AVX" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("the CPU has no AVX2")
    torch.ops.load_library(str(narrowed_library(tmp_path, target)))
    operation = getattr(torch.ops, f"cram_{target}").orthogonality_penalty
    p = penalty_inputs(FULL * 3).to(torch.float32)
    lists = (p.hidden, p.trained_a, p.trained_b, p.bases)
    found = operation(*lists, torch.cat(p.gamma), None, p.scale, True, True, True, True)
    assert_within_budget(dict(zip(NAMES, found, strict=True)), run_impl(p, "reference"), run_oracle(p))
