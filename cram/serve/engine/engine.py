"""The engine: continuous batching over one attached model, in a thread of its own.

One turn of the engine:

    calls       one dry run, and changes of the experts, between steps
    admit       waiting requests, as long as there are rows for their answers
    read        a piece of one prompt; routed once, its answers then join a batch
    step        one token for every answer in flight

Every prompt is read alone, with the experts that are current when its reading begins. Answers of different
experts share a forward; answers of different versions of the experts do not.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from cram.methods.parts.grouped import GroupedMethod
from cram.model.attached import AttachedModel
from cram.serve.engine.calls import Call
from cram.serve.engine.decide import Decider
from cram.serve.engine.few_rows import use_native_products
from cram.serve.engine.limits import Limits
from cram.serve.engine.pruning import PrunedRoutes
from cram.serve.engine.versions import Version, Versions
from cram.serve.engine.worker import Worker
from cram.serve.metrics import Metrics
from cram.serve.request import (
    Collector,
    Decision,
    Failed,
    Prompt,
    QueueFullError,
    Request,
    check_mixture,
)


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
            gate_floor: Automatic gates below it are dropped, see `cram.serve.engine.pruning`; 0 drops none.

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
        self._decider = Decider(self.cram, routes)
        self.cram.hooks.method = self._decider.routes
        self.metrics = Metrics()
        self.versions = Versions(self.cram)
        self._worker = Worker(model, processor, self.limits, self._decider, self.versions, self.metrics)
        self._take_back = use_native_products(model)
        self._waiting: deque[Request] = deque()
        self._calls: deque[Call] = deque()
        self._changes: deque[Call] = deque()
        self._changed = threading.Condition()
        self._accepting, self._stopping = True, False
        # What a turn has taken out of its queue is in none, until it is in flight or done.
        self._turning, self._given_up = False, False
        self._taken: Request | None = None
        self._thread: threading.Thread | None = None

    # From any thread

    def submit(self, request: Request) -> None:
        """Put a request into the queue.

        Raises:
            QueueFullError: If the queue is full or the engine stops.
            RequestError: If the request asks for more than the limits allow.
        """
        self.limits.check(request)
        with self._changed:
            self.check_room()
            self._waiting.append(request)
            self._changed.notify_all()

    def check_room(self) -> None:
        """Refuse a request that would find no place in the queue.

        Raises:
            QueueFullError: If the queue is full or the engine stops.
        """
        if not self._accepting or len(self._waiting) >= self.limits.waiting:
            self.metrics.rejected += 1
            raise QueueFullError(
                "the queue is full" if self._accepting else "the server takes no more requests"
            )

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
        """Which experts would answer a prompt, without an answer.

        Raises:
            RequestError: If a scale of the mixture is out of range.
        """
        check_mixture(mixture)

        def dry_run() -> Decision:
            self.versions.act(self.versions.current)
            return self._decider.dry_run(prompt, mixture, self.versions.current)

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
    def context(self) -> int:
        """Tokens of prompt and answer together at most."""
        return self._worker.context

    @property
    def load(self) -> tuple[int, int]:
        """Requests that wait, and answers in flight."""
        return len(self._waiting), self._worker.rows

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
        return done and not self._given_up

    @property
    def busy(self) -> bool:
        """Whether anything is waiting, in work or in flight."""
        return bool(self._turning or self._calls or self._changes or any(self.load))

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
        """One turn; see the head of this file."""
        self._turning = True
        try:
            self._turn()
        finally:
            self._turning = False

    def _turn(self) -> None:
        # One, so that whoever asks again and again does not keep the others waiting.
        if self._calls:
            self._calls.popleft().run()
        while self._changes and (self.versions.swaps_in_flight or not self._worker.rows):
            self._changes.popleft().run()
        self._worker.remove_cancelled()
        while (request := self._admitted()) is not None:
            self._taken = request
            self._worker.begin(request)
            self._taken = None
        self._worker.read()
        self._worker.step()
        self.metrics.observe_load(*self.load)

    def _admitted(self) -> Request | None:
        """The next request, taken out of the queue, or None if it must wait."""
        with self._changed:
            if any(each.cancelled for each in self._waiting):
                self._waiting = deque(each for each in self._waiting if not each.cancelled)
            if not self._waiting or self._changes:
                return None
            if self._worker.rows + self._waiting[0].sampling.n > self.limits.rows:
                return None
            return self._waiting.popleft()

    def _give_up(self) -> None:
        """Tell everybody who still waits that there will be no answer."""
        with self._changed:
            self._accepting, self._stopping = False, True
            left = [*self._waiting] if self._taken is None else [self._taken, *self._waiting]
            self._given_up = bool(left) or self.busy
            self._waiting.clear()
        self._taken = None
        self._worker.give_up()
        for request in left:
            self._worker.tell(request, Failed("the server has stopped", "server"))
        for call in (*self._calls, *self._changes):
            call.refuse()
        self._calls.clear()
        self._changes.clear()
        self.cram.hooks.method = self.cram.method
        self._take_back()
        with self._changed:
            self._changed.notify_all()
