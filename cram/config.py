"""Every constant of CRAM in one frozen object, with where it comes from.

Two kinds of constants: those the paper reports (its section on implementation details and its hyper-parameter
table) and those found only in the released implementation. The comment after each field says which ("paper",
"code") or that the field belongs to this package ("ours"). The stream presets change only what the released
runs change.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# name -> (test, what the value must be); run after the type check of the field.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "group_margin": (lambda v: 0 <= v <= 2, "in [0, 2]"),
    "group_merge_similarity": (lambda v: -1 <= v <= 1, "in [-1, 1]"),
    "max_groups": (lambda v: v >= 1, "at least 1"),
    "sigma": (lambda v: v > 0, "positive"),
    "tau_alloc": (lambda v: v >= 0, "at least 0"),
    "tau_orth": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "warmup_fraction": (lambda v: 0 < v < 1, "in (0, 1)"),
    "buffer_rank": (lambda v: v >= 1, "at least 1"),
    "rank": (lambda v: v >= 1, "at least 1"),
    "rank_min": (lambda v: v >= 0, "at least 0"),
    "rank_max": (lambda v: v >= 1, "at least 1"),
    "scale": (lambda v: v > 0, "positive"),
    "dropout": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "penalty_weight": (lambda v: v >= 0, "at least 0"),
    "target_projections": (lambda v: 0 < len(v) == len(set(v)), "a non-empty tuple of distinct names"),
    "learning_rate": (lambda v: v > 0, "positive"),
    "lr_warmup_ratio": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "weight_decay": (lambda v: v >= 0, "at least 0"),
    "grad_clip": (lambda v: v >= 0, "at least 0"),
    "batch_size": (lambda v: v >= 1, "at least 1"),
    "epochs": (lambda v: v >= 1, "at least 1"),
    "max_steps": (lambda v: v is None or v >= 2, "None or at least 2 (one warm-up step, one expert step)"),
    "eval_batch_size": (lambda v: v >= 1, "at least 1"),
    "seed": (lambda v: v >= 0, "at least 0"),
    "method": (bool, "the name of a method"),
}


@dataclass(frozen=True)
class CramConfig:
    """Hyper-parameters of the method (arXiv 2606.02502) and of its training loop.

    Instances are immutable and always valid: a wrong value raises at construction, integers given for a float
    field become floats, and ``from_dict(to_dict())`` is the identity.

    Raises:
        ValueError: if a field has the wrong type, is NaN or infinite, is out of range, or if ``rank_min``
            exceeds ``rank_max`` or ``rank_max`` exceeds ``buffer_rank``.
    """

    # Instruction groups (level 1).
    group_margin: float = 0.1  # paper: theta, best minus second-best cosine needed to join a group
    group_merge_similarity: float = 0.8  # code: cosine needed to join when there is exactly one group
    max_groups: int = 5  # code: G_max, 5 on UCIT and 10 on TriGap
    # Centroid routing (level 2).
    sigma: float = 2.0  # paper: width of the Gaussian kernel on image features
    # Adaptive-rank instantiation.
    tau_alloc: float = 0.08  # paper: absolute singular-value threshold of s B A
    tau_orth: float = 0.99  # paper: novelty a direction must exceed; 0 turns filter and projection off
    warmup_fraction: float = 0.05  # paper: share of a task's steps that train the buffer
    buffer_rank: int = 48  # paper: rank of the temporary buffer
    rank_min: int = 4  # code: floor of an expert's rank per module
    rank_max: int = 9  # code: R_max, 9 on UCIT and 10 on TriGap
    # Low-rank layers.
    rank: int = 9  # ours: rank of methods whose LoRAs have one size, as large as CRAM's largest on UCIT
    scale: float = 2.0  # code: LoRA alpha / r, the same for the buffer and for every rank
    dropout: float = 0.05  # code: LoRA dropout on the layer input
    penalty_weight: float = 1.0  # code: lambda of the orthogonality penalty
    released_code: bool = False  # ours: reproduce the released code where it departs from the paper
    target_projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")  # paper: attention LoRA
    method: str = "cram"  # ours: a name in cram.methods.METHODS
    # Training.
    learning_rate: float = 2e-4  # paper
    lr_warmup_ratio: float = 0.03  # paper: linear warm-up, then cosine
    weight_decay: float = 0.0  # code
    grad_clip: float = 1.0  # code: default of the Hugging Face trainer it runs on; 0 turns clipping off
    batch_size: int = 8  # paper
    epochs: int = 1  # paper
    max_steps: int | None = None  # ours: caps the optimiser steps of a task
    eval_batch_size: int = 64  # ours: answers do not depend on it
    seed: int = 0  # ours
    gradient_checkpointing: bool = False  # ours: the released 7B runs turn it on

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = _typed(field.name, str(field.type), getattr(self, field.name))
            object.__setattr__(self, field.name, value)
            if field.name in _RULES and not _RULES[field.name][0](value):
                raise ValueError(f"{field.name} must be {_RULES[field.name][1]}, got {value!r}")
        if self.rank_min > self.rank_max:
            raise ValueError(f"rank_min must not exceed rank_max={self.rank_max}, got {self.rank_min}")
        if self.rank_max > self.buffer_rank:
            raise ValueError(f"rank_max must not exceed buffer_rank={self.buffer_rank}, got {self.rank_max}")

    @classmethod
    def ucit(cls, **changes: Any) -> CramConfig:
        """The released settings of the UCIT stream (six tasks), with ``changes`` on top."""
        return cls.from_dict({"max_groups": 5, "rank_max": 9, "rank": 9, **changes})

    @classmethod
    def trigap(cls, **changes: Any) -> CramConfig:
        """The released settings of the TriGap stream (ten tasks), with ``changes`` on top."""
        return cls.from_dict({"max_groups": 10, "rank_max": 10, "rank": 10, **changes})

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values (tuples as lists)."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CramConfig:
        """Builds a config from JSON values; absent fields keep their defaults.

        Raises:
            ValueError: on an unknown key (the message lists the known ones) or an invalid value.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"config keys must be among {known}, got {unknown}")
        return cls(**values)


def read_config(record: Mapping[str, Any]) -> CramConfig:
    """A configuration from a bundle or a run, also of an older version, in which `rank_max` was every rank.

    Raises:
        ValueError: as ``CramConfig.from_dict``.
    """
    return CramConfig.from_dict({"rank": record.get("rank_max", CramConfig.rank), **record})


def _typed(name: str, kind: str, value: Any) -> Any:
    """Checks one value against its annotation; returns it with ints made floats and lists made tuples."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "float" and number and abs(value) <= sys.float_info.max:
        return float(value)
    if kind in ("bool", "str") and type(value).__name__ == kind:
        return value
    if kind.startswith("int") and number and isinstance(value, int):
        return value
    if kind.endswith("None") and value is None:
        return value
    texts = isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)
    if kind.startswith("tuple") and texts:
        return tuple(value)
    raise ValueError(f"{name} must be a {'finite ' * (kind == 'float')}{kind}, got {value!r}")
