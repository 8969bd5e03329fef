"""The expert layer on each instruction set that it is compiled for, not only this machine's best."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cram_kernels.testing import LayerInputs, assert_within_rounding, layer_inputs
from csrc import build
from tests.csrc.narrowed import ANY, AVX512, narrowed_library, require_target

PAIRS = '__builtin_cpu_supports("avx512bf16")'
TORCH = "answer = ask_torch()"
TILES, NO_TILES = "const reason = ask()", 'const reason = "none"'
# What the library must believe, by the set that it then takes; none of them takes pairs.
BELIEFS: dict[str, dict[str, str]] = {
    "avx512": {AVX512: "true", 'target("avx512f,avx2': 'target("avx2', PAIRS: "false", TILES: NO_TILES},
    "avx2": {AVX512: "false", PAIRS: "false", TORCH: "answer = false", TILES: NO_TILES},
    "baseline": {ANY: f"false && {ANY}", TORCH: "answer = false", TILES: NO_TILES},
    # The instruction of the tile unit is a loop; packing and everything around it are those of the library.
    "tiles": {"{half_from, half_base, half_gradient}": "{1, 200, 200}"},
}
FLAGS = {"tiles": ("-DCRAM_TILE_MODEL",)}
# T, D_in, D_out, S; among them one token, and more tokens than a chunk of summed rows has.
SHAPES = ((24, 20, 28, 4), (1, 257, 1111, 1), (70, 129, 600, 7), (300, 40, 80, 3))


def run(operations: object, inputs: LayerInputs) -> dict[str, Tensor]:
    """Forward and backward through the operations of one library."""
    experts = inputs.experts()
    factors = experts.a, experts.bt, experts.expert_of_row, inputs.gates, inputs.scale
    tail = experts.total_rank - experts.trained_rank
    forward, backward = operations.packed_expert_lora_forward, operations.packed_expert_lora_backward
    y, z = forward(inputs.x, inputs.weight, inputs.bias, *factors, 0, 0, 0, 0)
    grads = backward(inputs.dy, inputs.x, z, inputs.weight, *factors, tail, 0, 0, 0, True, True, True, True)
    return {"y": y} | dict(zip(("dx", "dgates", "da", "db"), grads, strict=True))


@pytest.mark.parametrize("target", BELIEFS)
def test_every_instruction_set(target: str, tmp_path: Path) -> None:
    require_target(target)
    name, folder = f"cram_{target}_lora", build.HERE / "expert_lora"
    files = [f"expert_lora/{path.name}" for path in sorted(folder.glob("*.cpp"))]
    torch.ops.load_library(
        str(narrowed_library(tmp_path, name, BELIEFS[target], files, "-O1", *FLAGS.get(target, [])))
    )
    operations = getattr(torch.ops, name)
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
