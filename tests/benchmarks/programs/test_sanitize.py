"""The checks that compute-sanitizer watches pass here, and say where they do not."""

from __future__ import annotations

import pytest
import torch

from benchmarks import truth
from benchmarks.programs import sanitize
from tests.cram_kernels.devices import needs_interpreter


def test_checks_pass_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert sanitize.main(["--device", "cpu"]) == 0
    assert "checks passed on cpu" in capsys.readouterr().out


def test_checks_report_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("misaligned address")

    monkeypatch.setattr(sanitize, "passed", broken)
    assert sanitize.main(["--device", "cpu"]) == 1
    assert "FAILED decode/toy.k/toy/T1/float32 cram cpu: misaligned address" in capsys.readouterr().out


def test_what_is_compiled_ahead_is_what_is_checked_on_a_gpu() -> None:
    ahead = [name for name, _ in sanitize.calls(torch.device("meta"))]
    checked = [case.name for case, name, _ in sanitize.checked("bfloat16") if "triton" in name]
    others = ["sanitize dropout and segment map", "sanitize W and A in one launch"]
    assert ahead == [*(f"sanitize {name}" for name in checked), *others]


@needs_interpreter
def test_one_launch_is_compared_with_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sanitize._streamed_right(torch.device("cpu"), "float32") < truth.LIMITS["float32"]
    monkeypatch.setattr(truth, "experts", truth.base)
    with pytest.raises(truth.Wrong):
        sanitize._streamed_right(torch.device("cpu"), "float32")
