"""The peak of a piece of work is its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cram.compare import peak_memory
from cram.compare.peak_memory import PeakMemory

CPU = torch.device("cpu")
SIZE = 256 << 20


def test_the_peak_outlives_the_tensor_but_not_the_next_count() -> None:
    before = PeakMemory(CPU).bytes()
    if before is None:
        pytest.skip("this system does not count a process's peak")
    counted = PeakMemory(CPU)
    torch.ones(SIZE, dtype=torch.uint8)
    found = counted.bytes()
    after = PeakMemory(CPU).bytes()
    assert found is not None and after is not None
    assert found >= before + 0.9 * SIZE
    assert after <= found - 0.9 * SIZE


def test_a_gpu_counts_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    place, calls = torch.device("cuda", 1), []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", calls.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 if device == place else 0)
    assert PeakMemory(place).bytes() == 7 and calls == [place]


def test_a_system_that_does_not_count_gives_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak_memory, "_FORGET", Path("/proc/nowhere/clear_refs"))
    assert PeakMemory(CPU).bytes() is None
