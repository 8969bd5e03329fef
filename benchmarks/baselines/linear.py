"""The frozen base linear alone: forward, and dX in training. Every ratio divides by its time."""

from __future__ import annotations

import torch.nn.functional as F

from benchmarks.problem import Layer, Problem, leaf


def base(p: Problem) -> Layer:
    """y = W0 x + b."""
    x = leaf(p.x)
    return Layer(lambda: F.linear(x, p.weight, p.bias), {"x": x})
