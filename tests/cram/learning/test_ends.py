"""Runs that end at a write: by a kill, a signal, a full disk or a limit of file sizes. All go on."""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from cram.atomic import LOCK, read_json
from cram.streams import Stream
from tests.cram import runs
from tests.cram.kills import GROWING, every_end, writes
from tests.cram.runs import results, timeless

ROOT = Path(__file__).resolve().parents[3]


def run(folder: Path, tasks: int = 1) -> Any:
    """A run of the first tasks, of few steps."""
    stream = Stream("toy", runs.stream().tasks[:tasks])
    return runs.learner(folder, tasks=stream, max_steps=3).run()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Undisturbed runs by their number of tasks."""
    made: dict[int, Path] = {}

    def folder(tasks: int) -> Path:
        if tasks not in made:
            made[tasks] = tmp_path_factory.mktemp("whole") / "run"
            run(made[tasks], tasks)
        return made[tasks]

    return folder


def check_goes_on(folder: Path, undisturbed: Path, tasks: int = 1) -> None:
    """The same command ends with the undisturbed report, bundles and predictions."""
    assert timeless(run(folder, tasks)) == timeless(read_json(undisturbed / "report.json"))
    assert results(folder) == results(undisturbed)
    assert not (folder / LOCK).exists()


@contextmanager
def file_size(most: int) -> Iterator[None]:
    """No file may grow beyond so many bytes inside."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_a_limit_of_file_sizes_stops_a_run_that_goes_on_without_it(
    whole: Callable[[int], Path], tmp_path: Path, step: int
) -> None:
    """Each limit is one byte less than a file needs."""
    undisturbed, folder = whole(1), tmp_path / "run"
    sizes = sorted({path.stat().st_size for path in undisturbed.rglob("*") if path.is_file()})
    for size in sizes[::step]:
        with file_size(size - 1), pytest.raises((OSError, SafetensorError), match="too large"):
            run(folder)
        check_goes_on(folder, undisturbed)
        shutil.rmtree(folder)


@pytest.mark.slow
def test_a_full_disk_at_any_write_of_a_run_stops_a_run_that_goes_on_with_room(
    whole: Callable[[int], Path], tmp_path: Path
) -> None:
    undisturbed, folder = whole(2), tmp_path / "run"
    with writes() as counted:
        run(folder, 2)
    growing = [point for point, write in enumerate(counted) if write.split()[0] in GROWING]
    assert len(growing) > 50
    for point in growing:
        shutil.rmtree(folder)
        with writes(point, full=True), pytest.raises((OSError, SafetensorError), match="No space left"):
            run(folder, 2)
        check_goes_on(folder, undisturbed, 2)


@pytest.mark.slow
def test_a_kill_at_any_write_of_a_run_repeats_nothing_committed(
    whole: Callable[[int], Path], tmp_path: Path
) -> None:
    undisturbed, folder = whole(2), tmp_path / "run"
    for _ in every_end(lambda: run(folder, 2), lambda: shutil.rmtree(folder, ignore_errors=True)):
        check_goes_on(folder, undisturbed, 2)


SIGNALLED = """
import os, sys
from pathlib import Path
from tests.cram.learning.test_ends import run
left = int(sys.argv[2])
real = os.fsync
def fsync(handle):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), int(sys.argv[3]))
    real(handle)
os.fsync = fsync
run(Path(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("flush", [1, 4, 9, 16])
def test_a_signal_while_writing_ends_a_run_that_goes_on(
    whole: Callable[[int], Path], tmp_path: Path, number: int, flush: int
) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-c", SIGNALLED, str(folder), str(flush), str(int(number))]
    done = subprocess.run(command, cwd=ROOT, check=False)
    # SIGTERM is kept until the state is whole; the interruption that follows ends Python as SIGINT does.
    assert done.returncode == -(signal.SIGINT if number == signal.SIGTERM else number)
    check_goes_on(folder, whole(1))
