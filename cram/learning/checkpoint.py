"""Checkpoints within a task: everything that the rest of the task depends on.

    checkpoints/step-000200/
        state.safetensors    what is in training, the optimiser, the groups, the random generators
        checkpoint.json      step, losses, size and sha256 of the other file; to what it belongs

A checkpoint is built beside its place and renamed, so that it is there as a whole or not at all. It is
checked in full before it is used. The newest complete one is taken; a damaged one is named and passed over.
"""

from __future__ import annotations

import logging
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cram.atomic import new_folder, read_json, write_json
from cram.bundle.format import fingerprint
from cram.learning.parallel.processes import by_first, is_first, totals
from cram.learning.training import TaskLoop

LOGGER = logging.getLogger(__name__)
STATE, RECORD, COMPLETE = "state.safetensors", "checkpoint.json", "complete.json"
FORMAT = 1
KEPT = 2
MAX_RECORD_BYTES = 256 << 20
FIELDS: dict[str, type] = {"format": int, "of": dict, "values": dict, "state": dict}


def write_checkpoint(
    folder: Path, tensors: dict[str, Tensor], values: dict[str, Any], of: dict[str, Any]
) -> None:
    """Write a checkpoint atomically.

    Args:
        folder: Its folder.
        tensors: Tensors of any dtype.
        values: JSON values.
        of: What the checkpoint belongs to; see `read_checkpoint`.
    """
    whole = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    with new_folder(folder) as partial:
        save_file(whole, partial / STATE)
        state = fingerprint(partial / STATE)
        write_json(partial / RECORD, {"format": FORMAT, "of": of, "values": values, "state": state})


def read_checkpoint(folder: Path, of: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read and check a checkpoint.

    Args:
        folder: Its folder.
        of: What it must belong to.

    Raises:
        ValueError: If it is incomplete, damaged, of another format, or belongs to something else.
        OSError: If a file is missing.
    """
    record = _record(folder, of)
    if fingerprint(folder / STATE) != record["state"]:
        raise ValueError(f"{folder / STATE} must be as {RECORD} says, got other bytes")
    try:
        return load_file(folder / STATE), record["values"]
    except SafetensorError as error:
        raise ValueError(f"{folder / STATE} must be a safetensors file, got {error}") from error


def _record(folder: Path, of: dict[str, Any]) -> dict[str, Any]:
    """The record of a checkpoint, which must belong to what `of` names."""
    record = read_json(folder / RECORD, MAX_RECORD_BYTES)
    if not isinstance(record, dict) or {k: type(v) for k, v in record.items()} != FIELDS:
        raise ValueError(f"{folder / RECORD} must have the keys {sorted(FIELDS)}, got others")
    if record["format"] != FORMAT:
        raise ValueError(f"format of {folder / RECORD} must be {FORMAT}, got {record['format']}")
    if other := [name for name in of if record["of"].get(name) != of[name]]:
        raise ValueError(f"{folder} must belong to this training, got another {', '.join(other)}")
    return record


def mark_complete(folder: Path) -> None:
    """Write the list of all files of a checkpoint that another program has written, with their hashes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != COMPLETE)
    listed = {path.relative_to(folder).as_posix(): fingerprint(path) for path in files}
    write_json(folder / COMPLETE, {"files": listed})


def check_complete(folder: Path) -> None:
    """Refuse a checkpoint that is not as `mark_complete` has left it.

    Raises:
        ValueError: If the list is missing, or a file is missing or has other bytes.
    """
    if not (folder / COMPLETE).is_file():
        raise ValueError(f"{folder} must be a complete checkpoint with a {COMPLETE}, got none")
    record = read_json(folder / COMPLETE, MAX_RECORD_BYTES)
    files = record.get("files") if isinstance(record, dict) else None
    if not isinstance(files, dict):
        raise ValueError(f"{folder / COMPLETE} must list files, got none")
    for name, listed in files.items():
        path = folder / name
        if not path.is_file() or fingerprint(path) != listed:
            raise ValueError(f"{path} must be as {COMPLETE} says, got none or other bytes")


def newest_complete(output: Path, part: str, of: dict[str, Any]) -> Path:
    """The newest complete checkpoint-<step> of an output folder. It is named, and so is what is passed over.

    Args:
        output: A folder in which several tasks may have left checkpoints.
        part: The folder in a checkpoint that has its record.
        of: What the checkpoint must belong to.

    Raises:
        ValueError: If there is none.
    """
    for folder in _by_step(output, "checkpoint-"):
        try:
            check_complete(folder)
            _record(folder / part, of)
        except (ValueError, OSError) as error:
            LOGGER.warning("%s is passed over: %s", folder.name, error)
            continue
        LOGGER.warning("resuming from %s", folder)
        return folder
    raise ValueError(f"{output} must have a complete checkpoint of {of} to resume from, got none")


def _by_step(folder: Path, prefix: str) -> list[Path]:
    """The checkpoints `<prefix><step>` of a folder, the newest first."""
    numbers = {path: path.name.removeprefix(prefix) for path in folder.glob(f"{prefix}*")}
    steps = {path: int(number) for path, number in numbers.items() if number.isdigit()}
    return sorted(steps, key=steps.__getitem__, reverse=True)


class TaskCheckpoints:
    """The checkpoints of one task of a run; a `Keeper` of the training loop.

    Args:
        folder: Where they lie.
        every: Steps between two checkpoints; 0 for none but that of a run which is told to end.
        of: What the training is of; a checkpoint of anything else is passed over.
        prepare: Called once before the first one is written.
        say: Tells the user a line.
        ending: Whether the run is told to end.
    """

    def __init__(
        self,
        folder: Path,
        every: int,
        of: dict[str, Any],
        prepare: Callable[[], None],
        say: Callable[[str], None],
        ending: Termination,
    ) -> None:
        self.folder, self.every = folder, every
        self._of, self._prepare, self._say, self._ending = of, prepare, say, ending

    def resume(self, loop: TaskLoop) -> bool:
        """Take up the newest complete checkpoint; returns whether there was one."""
        for path in by_first(self._newest_first):
            try:
                tensors, values = read_checkpoint(path, self._of)
            except (ValueError, OSError) as error:
                self._say(f"{path.name} is passed over: {error}")
                continue
            loop.resume(tensors, values)
            self._say(f"resuming task {loop.steps.task} after step {loop.done} ({path})")
            return True
        return False

    def after_step(self, loop: TaskLoop) -> None:
        """Write a checkpoint if one is due.

        Raises:
            KeyboardInterrupt: Behind a checkpoint, if the run is told to end.
        """
        (ending,) = totals(self._ending.arrived)
        if ending or (self.every and loop.done % self.every == 0):
            self._write(loop)
        if ending:
            raise KeyboardInterrupt(
                f"stopped after step {loop.done} of {loop.steps.task}; the same command goes on from there"
            )

    def finish(self, task: str) -> None:
        """Delete all checkpoints of the task, whose bundle is written.

        Raises:
            KeyboardInterrupt: If the run is told to end.
        """
        self.remove()
        (ending,) = totals(self._ending.arrived)
        if ending:
            raise KeyboardInterrupt(f"stopped behind task {task}; the same command goes on from there")

    def remove(self) -> None:
        """Delete all checkpoints of the task."""
        if is_first() and self.folder.exists():
            shutil.rmtree(self.folder)

    def _write(self, loop: TaskLoop) -> None:
        state = loop.export()

        def write() -> None:
            self._prepare()
            path = self.folder / f"step-{loop.done:06d}"
            write_checkpoint(path, state.tensors, state.values, self._of)
            for older in self._newest_first()[KEPT:]:
                shutil.rmtree(older)

        by_first(write)

    def _newest_first(self) -> list[Path]:
        return _by_step(self.folder, "step-")


class Termination:
    """SIGTERM inside: noted while `deferred`, which is while a task is trained; else it ends the run at once.

    Attributes:
        arrived: True once the signal has come.
        deferred: True while it is only noted.
    """

    def __init__(self) -> None:
        """Nothing has come."""
        self.arrived, self.deferred = False, False
        self._before: Any = None

    def __enter__(self) -> Termination:
        """Take the signal. Only the main thread can. What has come before counts no more."""
        self.arrived = False
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._come)
        return self

    def __exit__(self, *exception: object) -> None:
        """Give the signal back."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _come(self, number: int, frame: Any) -> None:
        self.arrived = True
        if not self.deferred:
            raise KeyboardInterrupt("stopped; the same command goes on from what is written")
