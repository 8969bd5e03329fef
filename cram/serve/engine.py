"""The engine: continuous batching over one attached model, in a thread of its own.

One turn of the engine:

    calls       dry runs and changes of the experts, between steps
    prefill     at most one waiting request: read alone, routed once, then joined to a batch
    step        one token for every answer in flight

A prompt is always read alone, with the experts that are current at that moment. Answers of different experts
share a forward; answers of different versions of the experts do not.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError

from cram.learning.answers import end_ids
from cram.learning.batches import to_model
from cram.methods.parts.grouped import GroupedMethod
from cram.model.attached import AttachedModel
from cram.model.cache import made_cache
from cram.serve.batch import Batch
from cram.serve.decide import Decider
from cram.serve.metrics import Metrics
from cram.serve.pruning import PrunedRoutes
from cram.serve.request import (
    Collector,
    Decision,
    Delta,
    Failed,
    Prompt,
    QueueFullError,
    Request,
    RequestError,
    Started,
)
from cram.serve.sequence import Answer
from cram.serve.versions import Version, Versions

LOG = logging.getLogger("cram.serve")
# What a prompt, an image or a bundle can raise; anything else ends the engine.
FAULTS = (ValueError, RuntimeError, OSError, LookupError, TypeError, SafetensorError)


@dataclass(frozen=True)
class Limits:
    """Bounds of the engine.

    Attributes:
        rows: Answers in flight at most; a request of n answers takes n.
        waiting: Requests that wait at most.
        tokens: Tokens of an answer where the request names no number, and at most.
        context: Tokens of prompt and answer together; None for the model's own limit.
    """

    rows: int = 32
    waiting: int = 128
    tokens: int = 1024
    context: int | None = None


class Call:
    """A function that the engine's thread runs, and the future of its result."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function
        self.future: Future[Any] = Future()

    def run(self) -> None:
        """Run the function, unless nobody waits for it any more."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.function())
        except FAULTS as error:
            self.future.set_exception(error)
        finally:
            if not self.future.done():
                self.future.set_exception(RuntimeError("the call has failed"))

    def refuse(self) -> None:
        """The function will never run."""
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(QueueFullError("the server has stopped"))


class Engine:
    """Answers requests with one attached model.

    Attributes:
        cram: The model's handle.
        limits: The bounds.
        metrics: What is counted.
        versions: The experts.
    """

    def __init__(
        self, model: Any, processor: Any, limits: Limits | None = None, gate_floor: float = 0.0
    ) -> None:
        """Takes over an attached model; nothing else may run it while the engine does.

        Args:
            model: An attached model in evaluation mode, no expert in training.
            processor: Its processor; an object with a `tokenizer`, or a tokenizer.
            limits: The bounds.
            gate_floor: Automatic gates below it are dropped, see `cram.serve.pruning`; 0 drops none.

        Raises:
            ValueError: If the model is in training mode, an expert is in training, or `gate_floor` is not in
                [0, 1] or not supported by the method.
        """
        self.cram: AttachedModel = model.cram
        if model.training or self.cram.in_training:
            raise ValueError("model must be in evaluation mode with frozen experts, got one in training")
        self.limits = limits or Limits()
        if gate_floor and not isinstance(self.cram.method, GroupedMethod):
            raise ValueError(f"gate_floor must be 0 for {self.cram.config.method!r}, got {gate_floor}")
        routes = PrunedRoutes(self.cram.method, gate_floor) if gate_floor else self.cram.method
        self.cram.hooks.method = routes
        self._decider = Decider(self.cram, routes)
        self.metrics = Metrics()
        self.versions = Versions(self.cram)
        self._model = model
        self._tokenizer = getattr(processor, "tokenizer", processor)
        self._ends = end_ids(model, self._tokenizer)
        own = model.config.get_text_config().max_position_embeddings
        self.context = min(own, self.limits.context or own)
        self._waiting: deque[Request] = deque()
        self._calls: deque[Call] = deque()
        self._changes: deque[Call] = deque()
        self._batches: dict[tuple[Version, bool], Batch] = {}
        self._changed = threading.Condition()
        self._accepting, self._stopping = True, False
        self._thread: threading.Thread | None = None

    # From any thread

    def submit(self, request: Request) -> None:
        """Put a request into the queue.

        Raises:
            QueueFullError: If the queue is full or the engine stops.
            RequestError: If the request asks for more than the limits allow.
        """
        if request.sampling.n > self.limits.rows:
            raise RequestError(f"n must be at most {self.limits.rows}, got {request.sampling.n}")
        if (request.sampling.max_tokens or 1) > self.limits.tokens:
            raise RequestError(
                f"max_tokens must be at most {self.limits.tokens}, got {request.sampling.max_tokens}"
            )
        with self._changed:
            if not self._accepting or len(self._waiting) >= self.limits.waiting:
                self.metrics.rejected += 1
                raise QueueFullError(
                    "the queue is full" if self._accepting else "the server takes no more requests"
                )
            self._waiting.append(request)
            self._changed.notify_all()

    def answer(self, request: Request, collector: Collector) -> Collector:
        """Submit a request whose listener is `collector`, and wait for its last event."""
        self.submit(request)
        collector.done.wait()
        return collector

    def replace(self, load: Callable[[], Any]) -> Future[Version]:
        """Make new experts current between two steps; see `Versions.replace`.

        Answers in flight keep their experts. Where the method cannot hold two versions, no new answer begins
        until those in flight have ended.
        """
        return self._enqueue(self._changes, lambda: self.versions.replace(load))

    def roll_back(self) -> Future[Version]:
        """Make the experts before the current ones current again; see `Versions.roll_back`."""
        return self._enqueue(self._changes, self.versions.roll_back)

    def decide(self, prompt: Prompt, mixture: Mapping[str, float] | None = None) -> Future[Decision]:
        """Which experts would answer a prompt, without an answer."""

        def dry_run() -> Decision:
            self.versions.act(self.versions.current)
            return self._decider.dry_run(prompt, mixture, self.versions.current.number)

        return self._enqueue(self._calls, dry_run)

    def _enqueue(self, queue: deque[Call], function: Callable[[], Any]) -> Future[Any]:
        call = Call(function)
        with self._changed:
            if not self._accepting or len(queue) >= self.limits.waiting:
                raise QueueFullError("the server takes no more requests")
            queue.append(call)
            self._changed.notify_all()
        return call.future

    @property
    def load(self) -> tuple[int, int]:
        """Requests that wait, and answers in flight."""
        return len(self._waiting), sum(len(batch) for batch in list(self._batches.values()))

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread = threading.Thread(target=self._run, name="cram-engine", daemon=True)
        self._thread.start()

    def stop(self, timeout: float | None = None) -> bool:
        """Take no more requests, answer those that are there, and end the thread.

        Args:
            timeout: Seconds after which what is left is given up; None waits for all.

        Returns:
            Whether every request has been answered.
        """
        with self._changed:
            self._accepting = False
            done = self._changed.wait_for(lambda: not (self.busy and self.alive), timeout)
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        return done

    @property
    def busy(self) -> bool:
        """Whether anything is waiting or in flight."""
        return bool(self._calls or self._changes or any(self.load))

    # In the engine's thread

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self.busy or self._stopping)
                    if self._stopping:
                        break
                self.turn()
                with self._changed:
                    if not self.busy:
                        self._changed.notify_all()
        finally:
            self._give_up()

    def turn(self) -> None:
        """One turn: the calls, at most one prefill, one step of every batch."""
        while self._calls:
            self._calls.popleft().run()
        while self._changes and (self.versions.swaps_in_flight or not self.load[1]):
            self._changes.popleft().run()
        for batch in self._batches.values():
            batch.remove(lambda answer: answer.request.cancelled)
        self._admit()
        for key, batch in list(self._batches.items()):
            if len(batch):
                self._step(key[0], batch)
            if not len(batch) and key[0] is not self.versions.current:
                self._batches.pop(key, None)
        self.metrics.observe_load(*self.load)

    def _step(self, version: Version, batch: Batch) -> None:
        self.versions.act(version)
        rows = len(batch)
        with self.metrics.step(rows):
            try:
                batch.step()
            except RuntimeError as error:
                LOG.error("a step of %d answers failed: %s", rows, error)
                self._lose(batch)

    def _lose(self, batch: Batch) -> None:
        """A failed step leaves a cache of unknown content: its answers end, and the batch with them."""
        for request in dict.fromkeys(answer.request for answer in batch.answers):
            self._heard(request, Failed("the server could not compute this answer", "server"))
            request.cancel()
        self._batches = {key: each for key, each in self._batches.items() if each is not batch}

    def _admit(self) -> None:
        with self._changed:
            while self._waiting and self._waiting[0].cancelled:
                self._waiting.popleft()
            rows = sum(len(batch) for batch in self._batches.values())
            if not self._waiting or self._changes or rows + self._waiting[0].sampling.n > self.limits.rows:
                return
            request = self._waiting.popleft()
        try:
            self._prefill(request)
        except RequestError as error:
            self._heard(request, Failed(str(error), "request"))
        except FAULTS as error:
            LOG.error("a prompt failed: %s", error)
            self._heard(request, Failed("the server could not read this prompt", "server"))

    @torch.no_grad()
    def _prefill(self, request: Request) -> None:
        inputs = to_model(dict(request.prompt.encode()), self._model)
        ids = inputs["input_ids"][0]
        limit = self._token_limit(request, len(ids))
        self.versions.act(self.versions.current)
        core: Any = self._model.get_submodule(self.cram.family.core)
        if hasattr(core, "rope_deltas"):
            core.rope_deltas = None
        with self._decider.routed(request.prompt, request.mixture):
            output = self._model(**inputs, use_cache=True, logits_to_keep=1)
        state = self._decider.continued()
        delta = getattr(core, "rope_deltas", None)
        position = 0 if delta is None else int(delta.reshape(-1)[0])
        number = self.versions.current.number
        decision = self._decider.decision(state.route, request.mixture, number)
        self._heard(request, Started(len(ids), decision))
        key = self.versions.current, self._overrides(request)
        batch = self._batches.get(key)
        if batch is None:
            batch = self._batches[key] = Batch(self._model, self._heard, key[1])
        answers = [
            Answer(request, index, self._tokenizer, self._ends, limit, position)
            for index in range(request.sampling.n)
        ]
        batch.join(answers, made_cache(output), state, ids, output.logits[0, -1])

    def _token_limit(self, request: Request, prompt: int) -> int:
        asked = request.sampling.max_tokens
        left = self.context - prompt
        if left < (asked or 1):
            raise RequestError(
                f"prompt and answer must fit into {self.context} tokens, got a prompt of {prompt} "
                f"and max_tokens of {asked or 1}"
            )
        return asked or min(self.limits.tokens, left)

    def _overrides(self, request: Request) -> bool:
        """Whether the request's gates are used as they are; always where the gates are all there is."""
        return request.mixture is not None or isinstance(self.cram.method, GroupedMethod)

    def _heard(self, request: Request, event: Started | Delta | Failed) -> None:
        if request.cancelled:
            return
        self.metrics.count(request, event)
        request.listener(event)

    def _give_up(self) -> None:
        """Tell everybody who still waits that there will be no answer."""
        with self._changed:
            self._accepting, self._stopping = False, True
            left = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        left += dict.fromkeys(answer.request for batch in self._batches.values() for answer in batch.answers)
        self._batches.clear()
        for request in left:
            self._heard(request, Failed("the server has stopped", "server"))
        for call in (*self._calls, *self._changes):
            call.refuse()
        self._calls.clear()
        self._changes.clear()
        self.cram.hooks.method = self.cram.method
