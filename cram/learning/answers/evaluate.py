"""Tests the newest state of a run again, on the run's own stream or on another stream."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from cram.atomic import locked, read_json, write_json
from cram.attach import attach
from cram.bundle.bundle import load
from cram.bundle.runs import newest_bundle, read_run
from cram.config import read_config
from cram.console import ProgressBar
from cram.learning.answers.generate import published_line, run_test
from cram.learning.answers.journal import remove_parts
from cram.learning.batches import CACHE_BYTES, Budget, EncodedSplit
from cram.learning.checkpoint import Termination
from cram.learning.checks import check_tests
from cram.learning.parallel.processes import by_first, is_first
from cram.learning.run_folder import RESULT, manifest_digest
from cram.routing.clip import ClipEncoder
from cram.streams.digests import texts_digest
from cram.streams.types import Stream


def evaluate_run(
    run: Path, stream: Stream, model: nn.Module, processor: Any, encoder: ClipEncoder, progress: bool = True
) -> dict[str, float]:
    """Test the newest state of a run on every task of a stream.

    Predictions and `result.json` (accuracies, routing, what was tested) go to `eval/<stream>/` in the run
    folder. Predictions are written as they are made; a stopped evaluation goes on from them. Several
    processes share the work.

    Args:
        run: The run folder.
        stream: The tasks to test on.
        model: The run's base model, not attached.
        processor: The model's processor.
        encoder: The CLIP that routes.
        progress: True if progress and accuracies are printed.

    Returns:
        Task -> accuracy.

    Raises:
        ValueError: If the run has no trained task, if its newest bundle is damaged or belongs to another
            base, or if a method that needs the true task has not learnt a task of the stream. Also if
            another process evaluates there, a test could not be scored, the stream's name is no name of a
            folder, or its folder has the result of other samples.
    """
    check_tests(stream)
    out = by_first(lambda: _place(run, stream))
    identity = read_run(run)["identity"]
    bundle, learnt = newest_bundle(run)
    config = read_config({**identity["config"], "method": identity["method"]})
    method = attach(model, config, encoder, processor).method
    load(model, bundle)
    state = by_first(lambda: manifest_digest(bundle))
    started = time.monotonic()
    accuracies: dict[str, float] = {}
    routing, published = {}, {}
    samples, shown = sum(len(task.test) for task in stream.tasks), progress and is_first()
    bar = ProgressBar(f"test on {stream.name}", samples, shown)
    with locked(out) if is_first() else nullcontext(), bar, Termination():
        for task in stream.tasks:
            split = EncodedSplit(processor, task.test, Budget(CACHE_BYTES))
            file = out / "predictions" / f"{task.name}.jsonl"
            result = run_test(model, processor, method, task, split, file, bar, state)
            accuracies[task.name] = result.accuracy
            if result.routing is not None:
                routing[task.name] = result.routing
            if result.published is not None:
                published[task.name] = result.published
    record = {"learnt": learnt, "accuracies": accuracies, "routing": routing, "published": published}
    seconds = round(time.monotonic() - started, 3)
    by_first(lambda: write_json(out / RESULT, {**record, "seconds": seconds, "tested": _tested(stream)}))
    by_first(lambda: remove_parts(out / "predictions"))
    if shown:
        for name, accuracy in accuracies.items():
            print(f"{name:24} {accuracy:6.2f}")
        for name, each in published.items():
            print(published_line(name, each))
    return accuracies


def _place(run: Path, stream: Stream) -> Path:
    """The folder of an evaluation, which holds no result of other samples of the same tasks."""
    out = run / "eval" / stream.name
    if out.parent != run / "eval" or stream.name in ("", ".", ".."):
        raise ValueError(f"name of the stream must be one of a folder, got {stream.name!r}")
    known = read_json(out / RESULT) if (out / RESULT).is_file() else {}
    known, own = known.get("tested", {}), _tested(stream)
    if other := [name for name in own if known.get(name, own[name]) != own[name]]:
        raise ValueError(
            f"{out} must have the result of the same samples or none, got that of others for {other}; "
            "move it away"
        )
    return out


def _tested(stream: Stream) -> dict[str, dict[str, Any]]:
    """Task -> number of its test samples, and a fingerprint of what they say."""
    return {
        task.name: {"samples": len(task.test), "sha256": texts_digest(task.test)} for task in stream.tasks
    }
