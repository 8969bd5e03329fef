"""What the engine's thread does with one model: prompts that are being read, and answers in flight.

Prompts are read in pieces, one piece between two steps. The shortest prompt goes first, so that a short one
waits for one piece of a long one. A prompt that has been passed over `PATIENCE` times goes next.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from safetensors import SafetensorError

from cram.learning.answers.generate import end_ids
from cram.methods.parts.grouped import GroupedMethod
from cram.model.attached import AttachedModel
from cram.serve.engine.batch import Batch
from cram.serve.engine.decide import Decider
from cram.serve.engine.limits import Limits
from cram.serve.engine.prefill import Prefill, Read
from cram.serve.engine.sequence import Answer
from cram.serve.engine.versions import Version, Versions
from cram.serve.metrics import Metrics
from cram.serve.request import Delta, Failed, Request, RequestError, Started

LOG = logging.getLogger("cram.serve")
# What a prompt, an image or a bundle can raise; anything else ends the engine.
FAULTS = (ValueError, RuntimeError, OSError, LookupError, TypeError, MemoryError, SafetensorError)
PATIENCE = 3


class Worker:
    """Reads prompts and decodes answers; every call comes from one thread.

    Args:
        model: An attached model in evaluation mode.
        processor: Its processor; an object with a `tokenizer`, or a tokenizer.
        limits: The bounds.
        decider: Decides which experts answer.
        versions: The experts.
        metrics: What is counted.

    Attributes:
        context: Tokens of prompt and answer together at most.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        limits: Limits,
        decider: Decider,
        versions: Versions,
        metrics: Metrics,
    ) -> None:
        self._model, self._limits, self._metrics = model, limits, metrics
        self._decider, self._versions = decider, versions
        self._cram: AttachedModel = model.cram
        self._tokenizer = getattr(processor, "tokenizer", processor)
        self._ends = end_ids(model, self._tokenizer)
        own = model.config.get_text_config().max_position_embeddings
        self.context = min(own, limits.context or own)
        self._prefills: list[Prefill] = []
        self._batches: dict[tuple[Version, bool], Batch] = {}

    @property
    def rows(self) -> int:
        """Answers in flight, those whose prompt is being read included."""
        # Read from other threads too, while the engine's changes both.
        prefills, batches = list(self._prefills), list(self._batches.values())
        return sum(each.request.sampling.n for each in prefills) + sum(len(batch) for batch in batches)

    def remove_cancelled(self) -> None:
        """Drop prompts and answers that nobody waits for."""
        self._prefills = [each for each in self._prefills if not each.request.cancelled]
        for batch in list(self._batches.values()):
            try:
                batch.remove(lambda answer: answer.request.cancelled)
            except RuntimeError as error:
                LOG.error("answers could not be removed from %d: %s", len(batch), error)
                self._lose(batch)

    def begin(self, request: Request) -> None:
        """Take a request, whose prompt is read from here on."""

        def prepared() -> Prefill:
            prefill = Prefill(self._model, self._decider, request, request.prompt.encode())
            tokens = len(prefill.ids)
            prefill.limit = self._limits.answer_tokens(request.sampling, tokens, self.context)
            return prefill

        if (prefill := self._attempt(request, prepared)) is not None:
            self._prefills.append(prefill)

    def read(self) -> None:
        """Read a piece of one prompt; if it was the last one, its answers join a batch.

        The experts that are current at the first piece read the whole prompt and answer it.
        """
        if not self._prefills:
            return
        chosen = self._next()
        version = chosen.version = chosen.version or self._versions.current

        def advanced() -> Read | None:
            self._versions.act(version)
            found = chosen.advance(self._limits.piece)
            if found is not None:
                self._join(chosen, version, found)
            return found

        read = self._attempt(chosen.request, advanced)
        if read is not None or chosen.request.cancelled:
            self._prefills.remove(chosen)

    def step(self) -> None:
        """One token for every answer in flight."""
        for key, batch in list(self._batches.items()):
            if len(batch):
                self._step(key[0], batch)
            if not len(batch) and key[0] is not self._versions.current:
                self._batches.pop(key, None)

    def give_up(self) -> None:
        """Tell everybody whose answer has begun that it will not end."""
        left = [each.request for each in self._prefills]
        left += [answer.request for batch in self._batches.values() for answer in batch.answers]
        self._prefills.clear()
        self._batches.clear()
        for request in dict.fromkeys(left):
            self.tell(request, Failed("the server has stopped", "server"))

    def tell(self, request: Request, event: Started | Delta | Failed) -> None:
        """Count an event, and pass it to whoever waits for it."""
        if request.cancelled:
            return
        self._metrics.count(request, event)
        request.listener(event)

    def _attempt(self, request: Request, function: Callable[[], Any]) -> Any:
        """The result of a function; if it fails, the request fails alone, and the result is None."""
        try:
            return function()
        except RequestError as error:
            self.tell(request, Failed(str(error), "request"))
        except FAULTS as error:
            LOG.error("a prompt failed: %s", error)
            self.tell(request, Failed("the server could not read this prompt", "server"))
        request.cancel()
        return None

    def _next(self) -> Prefill:
        oldest, shortest = self._prefills[0], min(self._prefills, key=lambda each: each.left)
        if oldest.skipped >= PATIENCE:
            shortest = oldest
        oldest.skipped = 0 if shortest is oldest else oldest.skipped + 1
        return shortest

    def _join(self, prefill: Prefill, version: Version, read: Read) -> None:
        request = prefill.request
        decision = self._decider.decision(read.state.route, request.mixture, version)
        self.tell(request, Started(len(prefill.ids), decision))
        # A method's gates are used as they are where the gates are all there is.
        overrides = request.mixture is not None or isinstance(self._cram.method, GroupedMethod)
        batch = self._batches.get((version, overrides))
        if batch is None:
            batch = self._batches[version, overrides] = Batch(self._model, self.tell, overrides)
        answers = [
            Answer(request, index, self._tokenizer, self._ends, prefill.limit, read.position)
            for index in range(request.sampling.n)
        ]
        try:
            batch.join(answers, read.cache, read.state, read.logits)
        finally:
            if not batch.is_whole:
                LOG.error("a join has broken the cache of %d answers", len(batch))
                self._lose(batch)

    def _step(self, version: Version, batch: Batch) -> None:
        self._versions.act(version)
        rows = len(batch)
        with self._metrics.step(rows):
            try:
                batch.step()
            except RuntimeError as error:
                LOG.error("a step of %d answers failed: %s", rows, error)
                self._lose(batch)

    def _lose(self, batch: Batch) -> None:
        """What failed may leave a cache of unknown content: its answers end, and the batch with them."""
        for request in dict.fromkeys(answer.request for answer in batch.answers):
            self.tell(request, Failed("the server could not compute this answer", "server"))
            request.cancel()
        self._batches = {key: each for key, each in self._batches.items() if each is not batch}
