"""Choice of implementation: the default rule, refusals, what is reported."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from cram_kernels import available_impls
from cram_kernels.dispatch import IMPLS, Op

CPU, OTHER = torch.device("cpu"), torch.device("meta")
OP = Op("op", {"reference": lambda: "reference", "cpu": lambda: "cpu"})
BARE = Op("bare", {"reference": lambda: "reference"})


@pytest.mark.parametrize(
    ("op", "impl", "device", "chosen"),
    [
        (OP, "auto", CPU, "cpu"),
        (OP, "auto", OTHER, "reference"),
        (BARE, "auto", CPU, "reference"),
        (OP, "reference", CPU, "reference"),
        (OP, "cpu", OTHER, "cpu"),
    ],
)
def test_selection(op: Op, impl: str, device: torch.device, chosen: str) -> None:
    assert op.select(impl, device)() == chosen


def test_explicit_request_never_falls_back() -> None:
    with pytest.raises(
        NotImplementedError, match=r"bare has no 'cpu' implementation; it has \('reference',\)"
    ):
        BARE.select("cpu", CPU)
    with pytest.raises(NotImplementedError, match="'triton'"):
        OP.select("triton", CPU)
    with pytest.raises(ValueError, match="impl must be one of .*, got 'fast'"):
        OP.select("fast", CPU)


def test_report() -> None:
    report = available_impls()
    assert set(report) == {
        "expert_lora",
        "centroid_gates",
        "routed_expert_lora",
        "orthogonality_penalty",
    }
    for op, impls in report.items():
        assert set(impls) == set(IMPLS) and impls["reference"] is None
        assert all(reason is None or op in reason for reason in impls.values())


def test_import_needs_torch_only() -> None:
    code = (
        "import sys, cram_kernels; "
        "assert not {'cram', 'triton', 'transformers', 'safetensors'} & {m for m in sys.modules "
        "if sys.modules[m] is not None and '.' not in m and m != 'triton'}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
