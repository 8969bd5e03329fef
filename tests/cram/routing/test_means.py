"""Means over processes, and modules that no cast reaches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cram.routing import means
from cram.routing.means import CentroidMean, Float32Module


def test_every_process_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a second process whose rows are the same, plus one image of ones."""

    def reduce(packed: Tensor) -> None:
        packed.mul_(2).add_(1)

    monkeypatch.setattr(means.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(means.dist, "all_reduce", reduce)
    mean = CentroidMean()
    mean.update(torch.tensor([[1.0, 2.0], [3.0, 5.0]]))
    assert mean.count == 5
    torch.testing.assert_close(mean.mean(), torch.tensor([9.0, 15.0]) / 5)


def test_a_cast_leaves_and_a_move_takes_all_that_a_module_holds() -> None:
    module = Float32Module()
    module.inner = nn.Linear(2, 3)
    assert module.bfloat16().inner.weight.dtype == torch.float32
    assert module.to("meta").inner.weight.device.type == "meta"
