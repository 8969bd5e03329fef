"""The tile tuner without a GPU: what it tries, and what it says of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks.programs import tune


def test_tiles_to_try_are_the_shipped_one_and_the_grid() -> None:
    tiles = pytest.importorskip("cram_kernels.expert_lora.tiles")
    kinds = {"shrink": tiles.ShrinkTile, "expand": tiles.ExpandTile, "gram": tiles.GramTile}
    for op, spaces in tune.SPACES.items():
        for space in spaces:
            assert list(space) == [field.name for field in dataclasses.fields(kinds[op])]
    shipped = tiles.expand_tile(90, torch.bfloat16, 8192)
    case = next(case for case in tune.SHAPES if case.op == "expand" and case.tokens == 8192)
    found = tune.candidates(case, shipped)
    assert found[0] == shipped and len(set(found)) == len(found) > 20


def test_the_summary_puts_the_fastest_base_forward_the_shipped() -> None:
    rows = [
        {"tile": {"warps": 4}, "median_us": 3.0},
        {"tile": {"warps": 8}, "failed": "out of shared memory"},
        {"tile": {"warps": 2}, "median_us": 2.0},
    ]
    found = tune.summary(tune.SHAPES[0], rows)
    assert found["best"] == rows[2] and found["shipped"] == rows[0] and found["tried"] == 3
    assert tune.line(found).endswith("shipped 3 µs, best 2 µs (2,) of 3")
    assert tune.line(tune.summary(tune.SHAPES[0], rows[1:2])).endswith("no tile ran")


def test_toys_are_tried_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert tune.main(["--out", str(tmp_path)]) == 0
    assert "no CUDA device" in capsys.readouterr().out
    shapes = json.loads((tmp_path / "tiles.json").read_text())["shapes"]
    assert [shape["name"].split("/")[0] for shape in shapes] == ["shrink", "expand", "gram"]
    assert all("failed" not in row for shape in shapes for row in shape["rows"])
