"""Differences between methods, seed by seed: a pair has the same pictures, order of tasks and seed."""

from __future__ import annotations

from dataclasses import dataclass

from cram.report.schema import MethodReport, Report, by_seed
from cram.report.summary import Spread

REFERENCE = "cram"


@dataclass(frozen=True)
class Difference:
    """Last of a method less CRAM's.

    Attributes:
        name: The method or ablation.
        last: Mean and sample standard deviation over the seeds, in points.
        error: Standard error of the mean.
        ahead: Number of seeds in which the method is better than CRAM.
        seeds: Number of seeds.
    """

    name: str
    last: Spread
    error: float
    ahead: int
    seeds: int


def differences(report: Report) -> list[Difference]:
    """Return the difference of every other entry to CRAM; none without CRAM or with fewer than two seeds."""
    seeds = list(by_seed(report).values())
    if len(seeds) < 2 or REFERENCE not in seeds[0]:
        return []
    return [_difference(name, seeds) for name in seeds[0] if name != REFERENCE]


def _difference(name: str, seeds: list[dict[str, MethodReport]]) -> Difference:
    values = [methods[name]["last"] - methods[REFERENCE]["last"] for methods in seeds]
    spread = Spread.of(values)
    return Difference(
        name, spread, spread.std / len(values) ** 0.5, sum(value > 0 for value in values), len(values)
    )
