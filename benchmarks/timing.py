"""Time per call of several candidates, interleaved in one process.

On a CPU a sample is a number of calls between two readings of the clock. On CUDA a sample is a number of
replays of one graph between two events; the graph holds one call per set of buffers. A candidate that reads
device values on the host is called eagerly, and its row says so.

Calls walk through all sets of buffers, so no call finds its data in the cache. Eager candidates share one
walk. Otherwise a candidate would find the data that another candidate has just read.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Step = Callable[[], Any]
# Least length of a sample, far above the resolution of the clock.
SAMPLE_SECONDS = 2e-3
WARM_CALLS, WARM_SECONDS = 3, 0.3


@dataclass(frozen=True)
class Limits:
    """The limits of one case.

    Attributes:
        seconds: Time per candidate. The least number of samples is taken in any case.
        least, most: Least and largest number of samples per candidate.
        sets: Largest number of sets of buffers.
    """

    seconds: float
    least: int
    most: int
    sets: int = 32


@dataclass(frozen=True)
class Sampler:
    """A candidate ready to be timed.

    Attributes:
        run: Makes `calls` calls.
        calls: Number of calls per run.
        mode: "graph" or "eager".
    """

    run: Step
    calls: int
    mode: str


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: median, 10th and 90th percentile over the samples."""

    median_us: float
    low_us: float
    high_us: float
    samples: int


def sampler(
    steps: Sequence[Step], device: torch.device, captured: bool, turns: Iterator[int] | None = None
) -> Sampler:
    """Warm up every step, and return a sampler that calls the steps in turn.

    Args:
        steps: One call per set of buffers.
        device: The device of the calls.
        captured: True if the calls can be captured in a CUDA graph.
        turns: Counter of the calls of all candidates that share the sets. None makes a new counter.
    """
    if device.type == "cuda" and captured:
        return Sampler(_graph(steps), len(steps), "graph")
    deadline = time.perf_counter() + WARM_SECONDS
    for step in itertools.islice(itertools.cycle(steps), max(WARM_CALLS, len(steps))):
        step()
        if time.perf_counter() > deadline:
            break  # warming up does not matter to calls that take so long
    counted = itertools.count() if turns is None else turns
    return Sampler(lambda: steps[next(counted) % len(steps)](), 1, "eager")


def _graph(steps: Sequence[Step]) -> Step:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in steps:
            for _ in range(WARM_CALLS):
                step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def seconds(run: Step, repeats: int, device: torch.device) -> float:
    """Return the seconds that `repeats` runs take, one after another."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before.record()
    for _ in range(repeats):
        run()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def interleaved(samplers: dict[str, Sampler], device: torch.device, limits: Limits) -> dict[str, Timing]:
    """Time the candidates in rounds, one sample each a round, in an order that rotates."""
    if not samplers:
        return {}
    repeats = {
        name: max(1, round(SAMPLE_SECONDS / max(seconds(s.run, 1, device), 1e-7)))
        for name, s in samplers.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    order, deadline = list(samplers), time.perf_counter() + limits.seconds * len(samplers)
    for turn in range(limits.most):
        if turn >= limits.least and time.perf_counter() > deadline:
            break
        for name in order:
            found = seconds(samplers[name].run, repeats[name], device)
            samples[name].append(found / (repeats[name] * samplers[name].calls) * 1e6)
        order.append(order.pop(0))
    return {name: _summary(values) for name, values in samples.items()}


def _summary(values: list[float]) -> Timing:
    ordered = sorted(values)
    last = len(ordered) - 1
    return Timing(
        statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)], len(ordered)
    )
