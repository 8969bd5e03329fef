"""What the engine counts, and the counts in Prometheus' text format."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from cram.serve.request import Event, Failed, Request, Started

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Histogram:
    """Counts of values by upper bound.

    Args:
        bounds: The upper bounds, increasing.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str) -> Iterator[str]:
        """The histogram's lines."""
        total = 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum}"
        yield f"{name}_count {total}"


class Metrics:
    """The counts of one engine.

    Attributes:
        rejected: Requests that found the queue full.
    """

    def __init__(self) -> None:
        self.rejected = 0
        self._first_token, self._step = Histogram(SECONDS), Histogram(SECONDS)
        self._rows = Histogram(ROWS)
        self._waiting = self._flying = 0
        self._prompt_tokens = self._tokens = 0
        self._requests: Counter[str] = Counter()
        self._use: dict[str, float] = {}

    @contextmanager
    def step(self, rows: int) -> Iterator[None]:
        """Time one step of a batch."""
        began = time.monotonic()
        yield
        self._step.add(time.monotonic() - began)
        self._rows.add(rows)

    def observe_load(self, waiting: int, flying: int) -> None:
        """Note the queue and the answers in flight."""
        self._waiting, self._flying = waiting, flying

    def count(self, request: Request, event: Event) -> None:
        """Count what a request is told."""
        if isinstance(event, Failed):
            self._requests[event.fault] += 1
        elif isinstance(event, Started):
            self._requests["started"] += 1
            self._prompt_tokens += event.prompt_tokens
            self._first_token.add(time.monotonic() - request.submitted)
            for name, gates in (event.decision.gates or {}).items():
                self._use[name] = self._use.get(name, 0.0) + sum(gates) / len(gates)
        else:
            self._tokens += len(event.token_ids)

    def text(self) -> str:
        """All counts in Prometheus' text format."""
        lines = [
            *_metric("cram_queue_length", "gauge", "Requests that wait", [("", self._waiting)]),
            *_metric("cram_answers_in_flight", "gauge", "Answers that are decoded", [("", self._flying)]),
            *_metric(
                "cram_requests_rejected_total",
                "counter",
                "Requests that found the queue full",
                [("", self.rejected)],
            ),
            *_metric(
                "cram_requests_total",
                "counter",
                "Requests by how they went: started, or at fault",
                [(f'{{outcome="{name}"}}', n) for name, n in sorted(self._requests.items())],
            ),
            *_metric("cram_prompt_tokens_total", "counter", "Tokens of prompts", [("", self._prompt_tokens)]),
            *_metric("cram_tokens_total", "counter", "Tokens of answers", [("", self._tokens)]),
            *_metric(
                "cram_expert_gate_total",
                "counter",
                "Sum over requests of an expert's mean gate",
                [(f'{{expert="{name}"}}', use) for name, use in sorted(self._use.items())],
            ),
        ]
        for name, text, histogram in (
            ("cram_time_to_first_token_seconds", "From submission to the first token", self._first_token),
            ("cram_step_seconds", "Time of a step, one token of every answer in the batch", self._step),
            ("cram_batch_rows", "Answers in a step", self._rows),
        ):
            lines += [f"# HELP {name} {text}", f"# TYPE {name} histogram", *histogram.lines(name)]
        return "\n".join(lines) + "\n"


def _metric(name: str, kind: str, text: str, values: list[tuple[str, float]]) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}", *(f"{name}{label} {v}" for label, v in values)]
