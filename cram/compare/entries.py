"""The entries of a comparison: the registered methods at fair sizes, and CRAM without one of its ideas.

An entry is a method with changes to the comparison's `CramConfig`. Nothing else may differ: base, stream,
steps, learning rate, scale and seed are the same for all entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cram.config import CramConfig
from cram.methods import METHODS

ABLATED = "cram"
POOL_EXPERTS = 8


@dataclass(frozen=True)
class Budget:
    """The size of a kind of method.

    Attributes:
        rank: (rank_max, number of tasks, rank at which one LoRA equals CRAM's average expert) -> rank.
        reason: The reason why this size is fair.
    """

    rank: Callable[[int, int, int], int]
    reason: str


# Kind (`Method.budget`) -> its size. CRAM's own experts have at most `rank_max` rows in a module.
BUDGETS: dict[str, Budget] = {
    "task": Budget(
        lambda rank_max, tasks, average: rank_max,
        "at most rank_max rows per task and module, as many as an expert of CRAM may have",
    ),
    "pool": Budget(
        lambda rank_max, tasks, average: max(1, round(tasks * rank_max / POOL_EXPERTS)),
        f"{POOL_EXPERTS} experts for all tasks, together with rank_max rows per task",
    ),
    "branches": Budget(
        lambda rank_max, tasks, average: max(1, round(2 * tasks * rank_max / (1 + POOL_EXPERTS))),
        f"one A and {POOL_EXPERTS} B for all tasks; in a square linear, as many trained values as a pool of "
        f"{POOL_EXPERTS} experts",
    ),
    "one": Budget(
        lambda rank_max, tasks, average: average,
        "one LoRA for all tasks with as many trained values as the average expert of CRAM in the same seed",
    ),
}
# The kind whose size depends on the run of CRAM with the same seed, and its size without such a run.
SIZED_BY_CRAM = "one"
ALONE = "one LoRA for all tasks with rank_max rows; its size follows CRAM only where CRAM is compared too"


@dataclass(frozen=True)
class Ablation:
    """CRAM without one idea: the fields that switch the idea off, and a note for the report."""

    fields: Callable[[CramConfig], dict[str, Any]]
    note: str


# By the name on the command line; the entry is called "cram: no penalty".
ABLATIONS: dict[str, Ablation] = {
    "no-centroid-routing": Ablation(
        lambda config: {"sigma": 1e6},
        "with so large a sigma all experts of the group have the same weight",
    ),
    "no-groups": Ablation(lambda config: {"max_groups": 1}, "one instruction group for all tasks"),
    "fixed-rank": Ablation(
        lambda config: {"rank_min": config.rank_max},
        "every expert has rank_max rows in every module",
    ),
    "no-novelty-filter": Ablation(
        lambda config: {"tau_orth": 0.0, "overlap_ratio": 0.0},
        "directions are kept by strength alone and are not projected",
    ),
    "rank-after-training": Ablation(
        lambda config: {
            "warmup_fraction": 0.95,
            "rank_min": config.rank_max,
            "tau_orth": 0.0,
            "overlap_ratio": 0.0,
            "penalty_weight": 0.0,
        },
        "the buffer trains for almost all steps, then its strongest rank_max directions are kept everywhere",
    ),
    "no-penalty": Ablation(
        lambda config: {"penalty_weight": 0.0},
        "nothing keeps the new expert out of the old ones' output space",
    ),
    "as-released": Ablation(
        lambda config: {"released_code": True},
        "as the authors' released code, with one route for a whole batch",
    ),
}


@dataclass(frozen=True)
class Entry:
    """One line of a comparison: a method, or an ablation of CRAM by its name in `ABLATIONS`."""

    method: str
    ablation: str | None = None

    @property
    def name(self) -> str:
        """The entry's name in the report."""
        return self.method if self.ablation is None else f"{self.method}: {self.ablation.replace('-', ' ')}"

    @property
    def folder(self) -> str:
        """The run folder's name."""
        return self.method if self.ablation is None else f"{self.method}-{self.ablation}"

    @property
    def follows_cram(self) -> bool:
        """True if the entry's size depends on the run of CRAM with the same seed."""
        return METHODS[self.method].budget == SIZED_BY_CRAM

    @property
    def note(self) -> str:
        """The note of the entry with the default configuration, beside CRAM."""
        return self.note_of(CramConfig())

    def note_of(self, config: CramConfig, sized_by_cram: bool = True) -> str:
        """Return one or two sentences: what the entry is, and how its size was chosen.

        Args:
            config: The comparison's configuration.
            sized_by_cram: False if no run of CRAM decides the size of an entry that follows CRAM.
        """
        if self.ablation is not None:
            return f"CRAM with {self._changed(config)}: {ABLATIONS[self.ablation].note}."
        kind = METHODS[self.method]
        reason = BUDGETS[kind.budget].reason if sized_by_cram or not self.follows_cram else ALONE
        return f"{kind.about()} Size: {reason}."

    def _changed(self, config: CramConfig) -> str:
        assert self.ablation is not None
        return ", ".join(f"{key} = {value}" for key, value in ABLATIONS[self.ablation].fields(config).items())

    def changes(self, config: CramConfig, tasks: int, average: int | None) -> dict[str, Any]:
        """Return the fields in which the entry's configuration differs from the comparison's.

        Args:
            config: The comparison's configuration.
            tasks: Number of tasks of the stream.
            average: The rank at which one LoRA equals CRAM's average expert. None stands for `rank_max`.
        """
        if self.ablation is not None:
            return ABLATIONS[self.ablation].fields(config)
        rank_max = config.rank_max
        if self.method == ABLATED:
            return {}
        return {"rank": BUDGETS[METHODS[self.method].budget].rank(rank_max, tasks, average or rank_max)}


def entries(methods: Sequence[str], ablations: Sequence[str]) -> list[Entry]:
    """Return the entries in the order of the registry and of the table of ablations, CRAM first.

    Raises:
        ValueError: If a name is unknown or repeated, if there is no method, or if ablations come without
        CRAM.
    """
    for what, names, known in (("methods", methods, METHODS), ("ablations", ablations, ABLATIONS)):
        if len(set(names)) != len(names) or set(names) - known.keys():
            raise ValueError(f"{what} must be distinct names among {list(known)}, got {list(names)}")
    if not methods or (ablations and ABLATED not in methods):
        wanted = f"hold {ABLATED!r}, which is ablated" if ablations else "be at least one"
        raise ValueError(f"methods must {wanted}, got {list(methods)}")
    ordered = sorted((name for name in METHODS if name in methods), key=lambda name: name != ABLATED)
    found = [Entry(name) for name in ordered]
    return found + [Entry(ABLATED, name) for name in ABLATIONS if name in ablations]
