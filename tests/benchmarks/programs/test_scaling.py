"""Scaling curves at toy size, and what their page says of them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from benchmarks.cases import Case
from benchmarks.programs import scaling

CPU = torch.device("cpu")


def test_scaling_curves(tmp_path: Path) -> None:
    assert scaling.main(["--toy", "--device", "cpu", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "scaling.json").read_text())
    assert [len(curve["cells"]) for curve in found["curves"]] == [2, 2, 2, 2]
    failed = [
        r for c in found["curves"] for cell in c["cells"] for r in cell["rows"].values() if "failed" in r
    ]
    assert not failed
    text = (tmp_path / "scaling.md").read_text()
    assert "## Tokens" in text and "(modelled: rank 7" in text
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_curves_vary_one_number() -> None:
    for device in ("cpu", "cuda"):
        for curve in scaling.curves(torch.device(device), "full"):
            assert len(set(curve.cases)) == len(curve.values) == len(set(curve.values)) > 4
    experts = scaling.curves(CPU, "full")[0]
    assert [len(case.ranks) for case in experts.cases] == list(experts.values)
    assert experts.values[-1] == 1000 and {case.tokens for case in experts.cases} == {8}


def test_growth_is_in_multiples_of_ten_experts() -> None:
    def cell(experts: int, us: float) -> dict[str, object]:
        case = Case("decode", "square-64", "q", f"{experts}x8", 8, 8, "bfloat16")
        return {
            "value": experts,
            "case": vars(case),
            "rows": {"base": {"median_us": 100.0}, "cram cpu": {"median_us": 100.0 + us}},
        }

    found = scaling.growth([cell(1, -10.0), cell(4, -4.0), cell(10, 2.0)], "cram cpu")
    assert [(value, round(us, 6), moved) for value, us, moved in found] == [(4, 0.5, 1 / 3), (10, 1.0, 1.0)]
    assert scaling.growth([cell(1, 1.0), cell(10, 1.0)], "cram cpu") == []


def test_model_bytes() -> None:
    # 32 layers of four 4096 x 4096 linears at rank 7, and a centroid of 768 a layer, in float32.
    assert scaling.model_bytes("LLaVA-1.5-7B", 100) == 100 * 32 * 4 * (4 * 7 * 8192 + 768)
