"""Choice of implementation: the default rule, refusals, what is reported."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import pytest
import torch

from cram_kernels import available_impls
from cram_kernels.dispatch import IMPLS, Op, interpreted, triton_missing

CPU, CUDA, OTHER = torch.device("cpu"), torch.device("cuda"), torch.device("meta")
OP = Op("op", {"reference": lambda: "reference", "cpu": lambda: "cpu"})
BARE = Op("bare", {"reference": lambda: "reference"})
FAST = Op(
    "fast",
    {name: partial(str, name) for name in IMPLS},
    {"triton": triton_missing, "native": lambda device, dtype: None if dtype == torch.float32 else "dtype"},
)


@pytest.mark.parametrize(
    ("op", "impl", "device", "chosen"),
    [
        (OP, "auto", CPU, "cpu"),
        (OP, "auto", OTHER, "reference"),
        (OP, "auto", CUDA, "cpu"),
        (FAST, "auto", CPU, "cpu"),
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


def test_dtype_decides_where_an_implementation_asks_for_it() -> None:
    assert FAST.select("auto", CPU, torch.float32)() == "native"
    with pytest.raises(NotImplementedError, match="fast cannot run 'native' here: dtype"):
        FAST.select("native", CPU, torch.float64)


def test_triton_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert interpreted() and triton_missing(CPU, torch.float32) is None
    assert "must be on a CUDA device, got meta" in str(triton_missing(OTHER, torch.float32))
    assert "got torch.float64" in str(triton_missing(CPU, torch.float64))
    assert "wrong bfloat16 products" in str(triton_missing(CPU, torch.bfloat16))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "TRITON_INTERPRET=1" in str(triton_missing(CPU, torch.float32))


def test_report() -> None:
    report = available_impls()
    assert set(report) == {
        "expert_lora",
        "centroid_gates",
        "routed_expert_lora",
        "stacked_expert_lora",
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
