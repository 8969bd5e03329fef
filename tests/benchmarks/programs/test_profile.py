"""The profiled kernels run, each as often as asked."""

from __future__ import annotations

import pytest
import torch

from benchmarks.programs import profile


def test_toys_run_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert profile.main(["--toy", "--times", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == [case.name for case in profile.TOY]
