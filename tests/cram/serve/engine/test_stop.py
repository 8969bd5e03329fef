"""Stopping: what a turn has in work is answered, and what is not answered is told."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import pytest
from torch import Tensor

from cram.serve.engine.engine import Engine
from cram.serve.request import Prompt
from tests.cram.factories import QUESTIONS, routed_llava
from tests.cram.serve.serving import ask, llava_prompt


class Gate:
    """Work of the engine's thread that waits until it is let through."""

    def __init__(self) -> None:
        self._inside, self._open = threading.Event(), threading.Event()

    def wait(self) -> None:
        """Called by the work."""
        self._inside.set()
        assert self._open.wait(30)

    def stopped(self, engine: Engine) -> list[bool]:
        """What `stop` returns when it is called while the work is done."""
        assert self._inside.wait(30)
        found: list[bool] = []
        thread = threading.Thread(target=lambda: found.append(engine.stop(30)))
        thread.start()
        thread.join(0.3)
        self._open.set()
        thread.join(60)
        return found


def test_a_request_that_is_being_encoded_is_answered_before_the_end() -> None:
    model, processor, _ = routed_llava()
    engine, gate = Engine(model, processor), Gate()
    asked = llava_prompt(processor, QUESTIONS[0], 0)

    def slow() -> Mapping[str, Tensor]:
        gate.wait()
        return asked.encode()

    request, heard = ask(Prompt(slow, asked.instruction, asked.images))
    engine.start()
    engine.submit(request)
    assert gate.stopped(engine) == [True]
    assert heard.failed is None and heard.choices[0].finish


@pytest.mark.parametrize("kind", ["change", "dry run"])
def test_a_call_that_runs_is_waited_for(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor, _ = routed_llava()
    engine, gate = Engine(model, processor), Gate()
    owner, name = (engine.versions, "roll_back") if kind == "change" else (engine._decider, "dry_run")
    monkeypatch.setattr(owner, name, lambda *_: gate.wait())
    engine.start()
    future: Any = engine.roll_back() if kind == "change" else engine.decide(Prompt(dict))
    states: list[bool] = []
    stop = engine.stop
    monkeypatch.setattr(engine, "stop", lambda timeout: (states.append(engine.busy), stop(timeout))[1])
    assert gate.stopped(engine) == [True]
    assert states == [True] and future.result(0) is None


def test_an_engine_that_dies_tells_everybody_and_does_not_say_that_all_were_answered() -> None:
    class RiddleError(Exception):
        """Nothing that a prompt can raise."""

    model, processor, _ = routed_llava()
    engine = Engine(model, processor)
    gate = Gate()

    def broken() -> Mapping[str, Tensor]:
        gate.wait()
        raise RiddleError

    request, heard = ask(Prompt(broken, QUESTIONS[0]))
    waiting, other = ask(llava_prompt(processor, QUESTIONS[0], 0))
    engine.submit(request)
    engine.submit(waiting)
    hook, threading.excepthook = threading.excepthook, lambda _: None
    try:
        engine.start()
        assert gate.stopped(engine) == [False]
    finally:
        threading.excepthook = hook
    assert heard.failed is not None and other.failed is not None
