"""What the report page says in sentences: its conclusion, and what each picture shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from cram.report.columns import in_order, is_compared
from cram.report.summary import MethodSummary

SHOWN = 4  # methods that a description gives numbers for


def conclusion(methods: Sequence[MethodSummary], base: Mapping[str, float] | None) -> str:
    """The result of a report in one sentence.

    Args:
        methods: All methods of the report.
        base: Task -> accuracy of the untrained base, or None.
    """
    ordered = in_order(methods)
    compared = [method for method in ordered if is_compared(method)] or ordered
    best, *others = compared
    count = len(best.tasks)
    tasks = "its only task" if count == 1 else f"all {count} tasks"
    text = f"After the last task, {best.name} scores {_last(best)} % on average over {tasks}"
    if others:
        second = others[0]
        relation = "as much as" if _last(second) == _last(best) else "more than"
        rest = "the other method" if len(others) == 1 else "every other method"
        text += f", {relation} {rest} ({second.name}: {_last(second)} %)"
    if count > 1:
        text += f", and has forgotten {_forgotten(best)} points"
        text += f" ({others[0].name}: {_forgotten(others[0])})" if others else ""
    if base:
        text += f"; the untrained base scores {sum(base.values()) / len(base):.1f} %"
    return f"{text}."


def _last(method: MethodSummary) -> str:
    return f"{method.metrics['last'].mean:.1f}"


def _forgotten(method: MethodSummary) -> str:
    return f"{method.metrics['forgetting'].mean:.1f}".replace("-", "−")


def description(name: str, methods: Sequence[MethodSummary]) -> str:
    """What a picture shows, with its main numbers, for readers who do not see it.

    Args:
        name: File name of the picture, such as "curves" or "ranks_cram".
        methods: All methods of the report.
    """
    kind, _, method = name.partition("_")
    shown = [each for each in in_order(methods) if not each.ablation]
    if kind == "ablations":
        changes = [each for each in methods if each.ablation]
        return "Bars of accuracy at the end. " + _listed(f"{each.name}: {_last(each)} %" for each in changes)
    if kind == "ranks":
        grids = next(each for each in methods if each.name == method).ranks
        return f"Heat maps of ranks, {method}. " + _listed(
            f"{projection}: mean {np.nanmean(grid):.1f}, from {np.nanmin(grid):.0f} to {np.nanmax(grid):.0f}"
            for projection, grid in grids.items()
        )
    if kind == "routing":
        routing = next(each for each in methods if each.name == method).routing
        assert routing is not None
        rows = zip(
            routing.tasks, routing.group_accuracy, routing.expert_accuracy, routing.gate_entropy, strict=True
        )
        return f"Heat map of mean gates and bars, {method}. " + _listed(
            f"{task}: {group:.0f} % in the right group, {expert:.0f} % with the right expert first"
            + ("" if np.isnan(entropy) else f", entropy of the gates {entropy:.2f}")
            for task, group, expert, entropy in rows
        )
    kinds = {
        "matrices": "Heat maps of accuracy, a row per learnt task. Bottom rows",
        "curves": "Lines of accuracy per task. At the end",
        "ageing": "Lines of mean accuracy and of forgetting. At the end",
        "tradeoff": "Points of accuracy against size and training time. Accuracy",
        "cost": "Bars of parameters and seconds. Parameters and seconds of training",
    }
    if kind == "cost":
        numbers = (f"{m.name} {m.parameters.mean:,.0f}, {m.train_seconds.mean:,.0f} s" for m in shown)
    elif kind in ("matrices", "curves"):
        numbers = (f"{m.name} {', '.join(f'{value:.0f}' for value in m.matrix[-1])}" for m in shown[:SHOWN])
    else:
        numbers = (f"{m.name} {_last(m)} %, {_forgotten(m)} points forgotten" for m in shown)
    return f"{kinds[kind]}: {_listed(numbers)}"


def _listed(parts: Iterable[str]) -> str:
    return "; ".join(parts) + "."
