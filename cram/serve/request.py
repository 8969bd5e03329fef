"""What a client asks of the engine, and what the engine tells in return."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from torch import Tensor

MAX_SCALE = 100.0
MAX_CHOICES = 16
MAX_STOPS = 4
MAX_TOP_LOGPROBS = 20


class RequestError(ValueError):
    """A request that cannot be answered; the text is meant for the client."""


class QueueFullError(Exception):
    """The waiting queue has no place left, or the engine takes no more requests."""


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        encode: Makes the model inputs of a batch of one: `input_ids` [1, T], pixel tensors. The engine calls
            it from its own thread.
        instruction: The text that decides the instruction group.
        images: The images that decide the gates.
        num_bytes: What images and model inputs take of the memory, as far as it is known.
    """

    encode: Callable[[], Mapping[str, Tensor]]
    instruction: str = ""
    images: tuple[Image.Image, ...] = ()
    num_bytes: int = 0


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_tokens: Tokens of an answer at most; None for the engine's default.
        temperature: 0 takes the most probable token.
        top_p: Tokens are drawn from the smallest set with at least this probability; 0 leaves the most
            probable one.
        seed: Equal seeds give equal answers; None draws a new seed.
        n: Answers per request.
        stop: Strings that end an answer; the answer does not contain them.
        logprobs: How many alternatives per token are reported; None for no log-probabilities.

    Raises:
        RequestError: If a value is out of range.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        rules = (
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature <= 2, "in [0, 2]"),
            ("top_p", 0 <= self.top_p <= 1, "in [0, 1]"),
            ("seed", self.seed is None or -(2**63) <= self.seed < 2**63, "a 64-bit integer"),
            ("n", 1 <= self.n <= MAX_CHOICES, f"in [1, {MAX_CHOICES}]"),
            (
                "stop",
                len(self.stop) <= MAX_STOPS and all(self.stop),
                f"at most {MAX_STOPS} non-empty strings",
            ),
            (
                "logprobs",
                self.logprobs is None or 0 <= self.logprobs <= MAX_TOP_LOGPROBS,
                f"in [0, {MAX_TOP_LOGPROBS}]",
            ),
        )
        for name, legal, wanted in rules:
            if not legal:
                raise RequestError(f"{name} must be {wanted}, got {getattr(self, name)!r:.100}")


def check_mixture(mixture: Mapping[str, float] | None) -> None:
    """Refuse scales with which nothing can be computed.

    Raises:
        RequestError: If a scale is not finite or too large.
    """
    for name, scale in (mixture or {}).items():
        if not math.isfinite(scale) or abs(scale) > MAX_SCALE:
            raise RequestError(
                f"scale of {name!r:.100} must be finite and at most {MAX_SCALE:g} in size, got {scale}"
            )


@dataclass(frozen=True)
class Decision:
    """Which experts answer a request.

    Attributes:
        mode: "automatic", "mixture" or "base".
        bundle: Number of the expert version that answers.
        group: The instruction group, where the method has groups and chose one.
        gates: Expert -> gate per decoder layer, without experts whose gates are all 0. None where a method
            makes its gates inside the layers.
    """

    mode: str
    bundle: int
    group: int | None
    gates: dict[str, list[float]] | None


@dataclass(frozen=True)
class TokenLogprob:
    """One token with its natural log-probability and the most probable alternatives, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Started:
    """The prompt has been read and routed."""

    prompt_tokens: int
    decision: Decision


@dataclass(frozen=True)
class Delta:
    """New text of one answer.

    Attributes:
        index: Which of the n answers.
        text: New text; may be empty.
        token_ids: New tokens.
        logprobs: One per new token, where they were asked for.
        finish: None, or why the answer ends: "stop" or "length".
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: str | None = None


@dataclass(frozen=True)
class Failed:
    """The request has no answer.

    Attributes:
        message: Meant for the client.
        fault: "request" where the request is to blame, else "server".
    """

    message: str
    fault: str


Event = Started | Delta | Failed


@dataclass(eq=False)
class Request:
    """A request on its way through the engine.

    Attributes:
        prompt: What is asked.
        listener: Called from the engine's thread with every event; the last one is `Failed`, or the `Delta`
            that finishes the last of the n answers.
        sampling: How tokens are chosen.
        mixture: Expert -> scale; empty for the base model, None for automatic routing.
        submitted: Moment of the submission, in seconds of the monotonic clock.
    """

    prompt: Prompt
    listener: Callable[[Event], None]
    sampling: Sampling = field(default_factory=Sampling)
    mixture: Mapping[str, float] | None = None
    submitted: float = field(default_factory=time.monotonic)
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        check_mixture(self.mixture)

    def cancel(self) -> None:
        """No more tokens are computed for the request; its listener hears nothing more."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` has been called."""
        return self._cancelled.is_set()


@dataclass
class Choice:
    """One finished answer."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str | None = None


class Collector:
    """A listener that puts the answers together.

    Attributes:
        started: The first event, once it is there.
        choices: The n answers so far.
        failed: The failure, if there was one.
        done: Set with the last event.
    """

    def __init__(self, n: int = 1) -> None:
        self.started: Started | None = None
        self.choices = [Choice() for _ in range(n)]
        self.failed: Failed | None = None
        self.done = threading.Event()

    def __call__(self, event: Event) -> None:
        """Take one event."""
        if isinstance(event, Started):
            self.started = event
        elif isinstance(event, Failed):
            self.failed = event
            self.done.set()
        else:
            choice = self.choices[event.index]
            choice.text += event.text
            choice.token_ids += event.token_ids
            choice.logprobs += event.logprobs
            choice.finish = event.finish
            if all(each.finish for each in self.choices):
                self.done.set()


def as_dict(decision: Decision) -> dict[str, Any]:
    """A decision as JSON values: per expert the mean gate and the gates per layer."""
    gates = decision.gates
    return {
        "mode": decision.mode,
        "bundle": decision.bundle,
        "group": decision.group,
        "gates": None if gates is None else {name: sum(g) / len(g) for name, g in gates.items()},
        "gates_by_layer": gates,
    }
