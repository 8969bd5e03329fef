"""Every constant of CRAM in one frozen object, with its source.

The presets `ucit` and `trigap` change only what the released runs change.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# name -> (test, text of what the value must be). The field's type is checked first.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "group_margin": (lambda v: 0 <= v <= 2, "in [0, 2]"),
    "group_merge_similarity": (lambda v: -1 <= v <= 1, "in [-1, 1]"),
    "max_groups": (lambda v: v >= 1, "at least 1"),
    "sigma": (lambda v: v > 0, "positive"),
    "tau_alloc": (lambda v: v >= 0, "at least 0"),
    "tau_orth": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "overlap_ratio": (lambda v: v >= 0, "at least 0"),
    "warmup_fraction": (lambda v: 0 < v < 1, "in (0, 1)"),
    "buffer_rank": (lambda v: v >= 1, "at least 1"),
    "rank": (lambda v: v >= 1, "at least 1"),
    "rank_min": (lambda v: v >= 0, "at least 0"),
    "rank_max": (lambda v: v >= 1, "at least 1"),
    "scale": (lambda v: v > 0, "positive"),
    "dropout": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "penalty_weight": (lambda v: v >= 0, "at least 0"),
    "overlap_weight": (lambda v: v >= 0, "at least 0"),
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

    Instances are immutable and always valid: a wrong value raises at construction. An integer in a float
    field becomes a float. ``from_dict(to_dict())`` is the identity.

    The last word of each field is the source of its default. [paper]: the paper's section on implementation
    details or its table of hyper-parameters. [code]: only the released implementation has the value. [ours]:
    the field belongs to this package.

    Attributes:
        group_margin: theta. A task joins the best of several groups if its cosine leads the second by more
            than this. [paper]
        group_merge_similarity: A task joins the only group if its cosine is above this. [code]
        max_groups: G_max, 5 on UCIT and 10 on TriGap. Beyond it no group is opened. [code]
        sigma: Width of the Gaussian kernel on image features. [paper]
        tau_alloc: A direction of the buffer is kept if its singular value of s B A is above this. [paper]
        tau_orth: A direction is kept if its novelty is above this. 0 turns filter and projection off. [paper]
        overlap_ratio: A value other than 0 takes the place of tau_orth; see `cram.methods.parts.instantiate`.
            [ours]
        warmup_fraction: Share of a task's steps that train the buffer. [paper]
        buffer_rank: Rank of the temporary buffer. [paper]
        rank_min: Least rank of an expert per module. [code]
        rank_max: R_max, the largest rank of an expert per module; 9 on UCIT and 10 on TriGap. [code]
        rank: Rank of methods whose LoRAs have one size. It equals rank_max on UCIT. [ours]
        scale: s = alpha / r of a LoRA, the same for the buffer and for every rank. [code]
        dropout: Dropout on the input of a LoRA, while it trains. [code]
        penalty_weight: lambda of the orthogonality penalty. [code]
        overlap_weight: Weight of O-LoRA's penalty. Its public ports to LLaVA have 0.05 or 0.5. [code]
        instruction_types: True gives SMoLoRA one instruction feature per task; see `cram.methods.smolora`.
            [code]
        merge_by_inputs: True merges MAny's LoRAs by the inputs of the linears, not by the rows of A. [ours]
        fuse_products: True adds up HiDe's products B A, and its top layer takes one task. [ours]
        released_code: True reproduces the released code where it differs from the paper. [ours]
        target_projections: The adapted linears of every decoder layer, those of the attention. [paper]
        method: A name in `cram.methods.METHODS`. [ours]
        learning_rate: The highest learning rate. [paper]
        lr_warmup_ratio: Share of the steps in which the rate rises linearly. Then it falls as a cosine.
            [paper]
        weight_decay: Weight decay of AdamW. [code]
        grad_clip: Largest norm of the gradient, the default of the Hugging Face trainer. 0 turns clipping
            off. [code]
        batch_size: Samples per step, over all processes. [paper]
        epochs: Passes over a task's samples. [paper]
        max_steps: The optimiser steps of a task, in place of `epochs`. [ours]
        eval_batch_size: Samples per batch of a test. Answers do not depend on it. [ours]
        seed: Decides all randomness. [ours]
        gradient_checkpointing: True computes activations twice and so needs less memory. The released 7B runs
            turn it on. [ours]

    Raises:
        ValueError: If a field has the wrong type, is NaN or infinite, or is out of range. Also if
            ``rank_min`` exceeds ``rank_max``, or ``rank_max`` exceeds ``buffer_rank``.
    """

    # Instruction groups (level 1).
    group_margin: float = 0.1
    group_merge_similarity: float = 0.8
    max_groups: int = 5
    # Centroid routing (level 2).
    sigma: float = 2.0
    # Adaptive-rank instantiation.
    tau_alloc: float = 0.08
    tau_orth: float = 0.99
    overlap_ratio: float = 0.0
    warmup_fraction: float = 0.05
    buffer_rank: int = 48
    rank_min: int = 4
    rank_max: int = 9
    # Low-rank layers.
    rank: int = 9
    scale: float = 2.0
    dropout: float = 0.05
    penalty_weight: float = 1.0
    overlap_weight: float = 0.5
    instruction_types: bool = False
    merge_by_inputs: bool = False
    fuse_products: bool = False
    released_code: bool = False
    target_projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    method: str = "cram"
    # Training.
    learning_rate: float = 2e-4
    lr_warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    batch_size: int = 8
    epochs: int = 1
    max_steps: int | None = None
    eval_batch_size: int = 64
    seed: int = 0
    gradient_checkpointing: bool = False

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
        """Return the released settings of the UCIT stream (six tasks), with ``changes`` applied."""
        return cls.from_dict({"max_groups": 5, "rank_max": 9, "rank": 9, **changes})

    @classmethod
    def trigap(cls, **changes: Any) -> CramConfig:
        """Return the released settings of the TriGap stream (ten tasks), with ``changes`` applied."""
        return cls.from_dict({"max_groups": 10, "rank_max": 10, "rank": 10, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON values. Tuples become lists."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CramConfig:
        """Build a config from JSON values. Absent fields keep their defaults.

        Raises:
            ValueError: If a key is unknown or a value is invalid. The message lists the known keys.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"config keys must be among {known}, got {unknown}")
        return cls(**values)


def read_config(record: Mapping[str, Any]) -> CramConfig:
    """Return the configuration of a bundle or a run.

    Older versions have no `rank`; there `rank_max` is the rank of every method.

    Raises:
        ValueError: As ``CramConfig.from_dict``.
    """
    return CramConfig.from_dict({"rank": record.get("rank_max", CramConfig.rank), **record})


def _typed(name: str, kind: str, value: Any) -> Any:
    """Check one value against its annotation. Return it with integers as floats and lists as tuples."""
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
