"""The columns of the tables of methods, and the ranking of the methods. The page and `table.md` use both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cram.report.summary import MethodSummary, Spread
from cram.scoring.continual import DEFINITIONS


@dataclass(frozen=True)
class Column:
    """One measure of a method.

    Attributes:
        label: Heading, with the unit.
        definition: One sentence that defines the measure.
        value: Mean and spread over seeds. None if a report does not have the measure.
        show: Writes a number.
        better: 1 if more is better, -1 if less is better, 0 if no method is marked as the best.
    """

    label: str
    definition: str
    value: Callable[[MethodSummary], Spread | None]
    show: Callable[[float], str]
    better: int = 0


def human_count(value: float) -> str:
    """1234567 -> "1.23 M"."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def decimals(value: float) -> str:
    """Two decimals with a minus sign."""
    return f"{value:.2f}".replace("-", "−")


def _metric(key: str, label: str, better: int) -> Column:
    return Column(label, DEFINITIONS[key], lambda method: method.metrics[key], decimals, better)


COLUMNS = (
    _metric("last", "Last (%)", 1),
    _metric("avg", "Avg (%)", 1),
    _metric("mft", "MFT (%)", 1),
    _metric("bwt", "BWT", 1),
    _metric("forgetting", "Forgetting", -1),
    Column(
        "Parameters",
        "Parameters = trained values kept after the last task.",
        lambda method: method.parameters,
        human_count,
    ),
    Column(
        "Stored",
        "Stored = numbers in all tensors of the bundle after the last task, trained or not.",
        lambda method: method.stored_values,
        human_count,
    ),
    Column(
        "Bundle (MB)",
        "Bundle = bytes of all files of that bundle, in millions.",
        lambda method: method.bundle_megabytes,
        lambda value: f"{value:,.2f}",
    ),
    Column(
        "Kept data",
        "Kept data = training samples of older tasks that the method keeps and trains on again.",
        lambda method: method.kept_samples,
        human_count,
    ),
    Column(
        "Peak memory (MB)",
        "Peak memory = most memory that the process held while it learnt and tested, base and libraries "
        "included; on a GPU that of its tensors.",
        lambda method: method.peak_megabytes,
        lambda value: f"{value:,.0f}",
    ),
    Column(
        "Training (s)",
        "Training = wall-clock seconds of training on all tasks.",
        lambda method: method.train_seconds,
        lambda value: f"{value:,.1f}",
    ),
    Column(
        "Evaluation (s)",
        "Evaluation = wall-clock seconds of all tests over the stream.",
        lambda method: method.eval_seconds,
        lambda value: f"{value:,.1f}",
    ),
    Column(
        "Prefills",
        "Prefills = passes of the base over the prompt of an answer.",
        lambda method: method.prefills,
        lambda value: f"{value:.0f}",
    ),
    Column(
        "Added inference (%)",
        "Added inference = mean time of generate on one test batch with the method after the last task, over "
        "the bare base's on the same batch and as many tokens, less one. Measured in the run itself, beside "
        "whatever else ran then.",
        lambda method: method.added_inference,
        lambda value: f"{value:.0f}".replace("-", "−"),
    ),
)


def shown_columns(methods: Sequence[MethodSummary]) -> list[Column]:
    """Return the columns for which at least one method has a value."""
    return [column for column in COLUMNS if any(column.value(method) is not None for method in methods)]


def spread_text(column: Column, value: Spread) -> str:
    """Return the spread as text. A spread that would read as 0 gives an empty text."""
    text = column.show(value.std)
    return "" if text == column.show(0.0) else text


def is_compared(method: MethodSummary) -> bool:
    """True if a method is ranked: it is not told the task at test time, and it is no ablation."""
    return not method.told_task and not method.ablation


def ranks(methods: Sequence[MethodSummary]) -> dict[str, int]:
    """Return the places of the compared methods by mean Last, best first. Equal methods share a place."""
    lasts = {m.name: round(m.metrics["last"].mean, 2) for m in methods if is_compared(m)}
    return {name: 1 + sum(other > last for other in lasts.values()) for name, last in lasts.items()}


def in_order(methods: Sequence[MethodSummary]) -> list[MethodSummary]:
    """Order: compared methods by place, methods that are told the task, ablations. Ties keep their order."""
    place = ranks(methods)
    return sorted(methods, key=lambda m: (m.ablation, m.told_task, place.get(m.name, 0)))


def best_value(methods: Sequence[MethodSummary], column: Column) -> float | None:
    """Return the best number of a column among the compared methods, as shown. None if fewer than two."""
    values = [column.value(method) for method in methods if is_compared(method)]
    means = [round(value.mean, 2) for value in values if value is not None]
    return (
        column.better * max(column.better * mean for mean in means)
        if column.better and len(means) > 1
        else None
    )
