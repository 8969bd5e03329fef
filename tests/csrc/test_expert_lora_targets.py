"""The expert layer on each instruction set that it is compiled for, not only this machine's best."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cram_kernels.testing import LayerInputs, assert_within_rounding, layer_inputs
from csrc import build

AVX512, PAIRS = '__builtin_cpu_supports("avx512f")', '__builtin_cpu_supports("avx512bf16")'
TORCH = "answer = ask_torch()"
# What the library must believe, by the set that it then takes; none of them multiplies pairs. A CPU without
# AVX-512 runs its code too: the compiler splits wide vectors.
BELIEFS: dict[str, dict[str, str]] = {
    "avx512": {AVX512: "true", 'target("avx512f,avx2': 'target("avx2', PAIRS: "false"},
    "avx2": {AVX512: "false", PAIRS: "false", TORCH: "answer = false"},
    "baseline": {"__builtin_cpu_supports(": "false && __builtin_cpu_supports(", TORCH: "answer = false"},
}
# T, D_in, D_out, S; among them one token, and more tokens than a chunk of summed rows has.
SHAPES = ((24, 20, 28, 4), (1, 257, 1111, 1), (70, 129, 600, 7), (300, 40, 80, 3))
FILES = ("vector.h", "expert_lora_pairs.cpp", "expert_lora_base.cpp")


def narrowed_library(folder: Path, target: str) -> Path:
    """Compile the expert layer such that it takes `target`; its namespace is cram_<target>_lora."""
    missed = set(BELIEFS[target])
    for path in build.sources(".h", ".cpp"):
        text = path.read_text(encoding="utf-8").replace("(cram, ", f"(cram_{target}_lora, ")
        for old, new in BELIEFS[target].items() if path.name in FILES else ():
            missed -= {old} if old in text else set()
            text = text.replace(old, new)
        (folder / path.name).write_text(text, encoding="utf-8")
    assert not missed
    torch_root, library = build.torch_folder(), folder / f"{target}.so"
    flags = [flag for flag in build.CXX_FLAGS if flag != "-O3"]
    command = [build.find_compiler(), *flags, "-O1", "-w", *build.DEFINES, f"-I{torch_root / 'include'}"]
    files = [str(folder / "ops.cpp"), *(str(path) for path in sorted(folder.glob("expert_lora*.cpp")))]
    link = [f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-o", str(library)]
    subprocess.run([*command, "-shared", *files, *link], check=True)
    return library


def run(operations: object, inputs: LayerInputs) -> dict[str, Tensor]:
    """Forward and backward through the operations of one library."""
    experts = inputs.experts()
    factors = experts.a, experts.bt, experts.expert_of_row, inputs.gates, inputs.scale
    tail = experts.total_rank - experts.trained_rank
    forward, backward = operations.packed_expert_lora_forward, operations.packed_expert_lora_backward
    y, z = forward(inputs.x, inputs.weight, inputs.bias, *factors, 0, 0, 0, 0)
    grads = backward(inputs.dy, inputs.x, z, inputs.weight, *factors, tail, 0, 0, 0, True, True, True, True)
    return {"y": y} | dict(zip(("dx", "dgates", "da", "db"), grads, strict=True))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other architectures have one instruction set")
@pytest.mark.parametrize("target", BELIEFS)
def test_every_instruction_set(target: str, tmp_path: Path) -> None:
    try:
        build.find_compiler()
    except build.Unavailable as reason:
        pytest.skip(str(reason))
    if target != "baseline" and "AVX" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("the CPU has no AVX2")
    torch.ops.load_library(str(narrowed_library(tmp_path, target)))
    operations = getattr(torch.ops, f"cram_{target}_lora")
    for shape in SHAPES:
        for dtype, expert_dtype in (
            (torch.float32, None),
            (torch.bfloat16, None),
            (torch.bfloat16, torch.float32),
        ):
            tokens, d_in, d_out, segments = shape
            inputs = layer_inputs((4, 9, 1, 6), tokens, d_in, d_out, segment_count=segments)
            inputs = inputs.to(dtype, expert_dtype)
            assert_within_rounding(run(operations, inputs), inputs)
