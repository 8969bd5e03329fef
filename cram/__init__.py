"""Continual instruction tuning of multimodal models with centroid-routed, adaptive-rank LoRA experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# `attach` is also a module: imported here, so that the name is the function whatever is imported first.
from cram.attach import attach, detach
from cram.bundle.bundle import load, save
from cram.config import CramConfig

if TYPE_CHECKING:
    from cram.learning.learner import ContinualLearner

__version__ = "0.1.0"

__all__ = ["ContinualLearner", "CramConfig", "__version__", "attach", "detach", "load", "save"]


def __getattr__(name: str) -> Any:
    """The learner on first use, because it needs the optional dependencies."""
    if name != "ContinualLearner":
        raise AttributeError(f"module 'cram' has no attribute {name!r}")
    from cram.learning.learner import ContinualLearner

    return ContinualLearner
