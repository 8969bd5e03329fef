"""Continual instruction tuning of multimodal models with centroid-routed, adaptive-rank LoRA experts."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# `attach` is also a module: imported here, so that the name is the function whatever is imported first.
from cram.attach import attach, detach
from cram.bundle.bundle import load, save
from cram.config import CramConfig

if TYPE_CHECKING:
    from cram.learning.learner import ContinualLearner
    from cram.learning.trainer import CramTrainer

__version__ = "0.1.0"

__all__ = [
    "ContinualLearner",
    "CramConfig",
    "CramTrainer",
    "__version__",
    "attach",
    "detach",
    "load",
    "save",
]
_LAZY = {"ContinualLearner": "cram.learning.learner", "CramTrainer": "cram.learning.trainer"}


def __getattr__(name: str) -> Any:
    """Learner and trainer on first use, because they need the optional dependencies."""
    if name not in _LAZY:
        raise AttributeError(f"module 'cram' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
