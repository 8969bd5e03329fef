"""Processes side by side: order, threads, faults, and that none outlives the one that started it."""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from cram.compare import processes
from cram.compare.processes import Job, run_side_by_side

# Long enough for any load: a test that passes waits for what happens, and never for the time.
PATIENCE_S, ASLEEP_S = 900, 3600


def note(folder: Path, name: str, beside: str | None = None) -> None:
    """Write begin and end of this call, which waits for the begin of another, and the threads it may use."""
    started, until = time.monotonic(), time.monotonic() + PATIENCE_S
    (folder / f"{name} began").touch()
    while beside and not (folder / f"{beside} began").exists() and time.monotonic() < until:
        time.sleep(0.05)
    (folder / name).write_text(f"{started} {time.monotonic()} {torch.get_num_threads()}")


def fail(text: str) -> None:
    raise ValueError(f"{text}\nsecond line")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep_on(folder: Path) -> None:
    (folder / "part").write_text(str(os.getpid()))
    (folder / "part").rename(folder / "pid")
    time.sleep(ASLEEP_S)


def jobs_of(folder: Path) -> list[Job]:
    return [
        Job("a", note, (folder, "a", "c")),
        Job("b", note, (folder, "b"), after="a"),
        Job("c", note, (folder, "c", "a")),
    ]


def test_jobs_share_time_and_threads_and_wait_for_what_they_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    start, started = processes._start, []

    def noted(job: Job, threads: int) -> Any:
        made = start(job, threads)
        started.append(made[0])
        return made

    monkeypatch.setattr(processes, "_start", noted)
    seen: list[set[str]] = []
    run_side_by_side(jobs_of(tmp_path), 2, lambda done: seen.append(set(done)))
    times = {name: [float(v) for v in (tmp_path / name).read_text().split()] for name in "abc"}
    assert times["b"][0] > times["a"][1], "b follows a"
    assert times["c"][0] < times["a"][1], "a and c run at once"
    assert [spent[2] for spent in times.values()] == [2, 2, 2]
    assert seen[-1] == {"a", "b", "c"} and set() in seen
    assert [process.name for process in started] == ["a", "c", "b"]
    # Python ends daemons with the process that started them.
    assert all(process.daemon for process in started)


def test_each_of_more_processes_than_threads_has_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(job: Job, threads: int) -> NoReturn:
        raise ValueError(f"{threads} for {job.name}")

    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(processes, "_start", refuse)
    with pytest.raises(ValueError, match="^1 for a$"):
        run_side_by_side([Job("a", fail, ())], 8, lambda done: None)


def test_a_child_is_quiet_has_its_threads_and_sends_its_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within this process, where nothing of it may last."""
    calls: list[Any] = []
    monkeypatch.setattr(processes, "_end_with_parent", lambda: None)
    monkeypatch.setattr(processes, "quiet_transformers", lambda: calls.append("quiet"))
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    monkeypatch.setattr(signal, "signal", lambda number, handler: calls.append(number))
    threads: list[threading.Thread] = []
    monkeypatch.setattr(threading.Thread, "start", lambda thread: threads.append(thread))
    ours, theirs = multiprocessing.Pipe(duplex=False)
    with ours, theirs:
        processes._child(Job("bad", fail, ("rank must be 3",)), 2, theirs)
        assert ours.recv() == "rank must be 3"
    assert calls == [signal.SIGINT, 2, "quiet"]
    # A thread that is no daemon would keep a child alive that has done its job.
    assert [thread.daemon for thread in threads] == [True]


def test_a_fault_is_named_and_stops_the_others(tmp_path: Path) -> None:
    waiting = [Job("long", sleep_on, (tmp_path,)), Job("bad", fail, ("rank must be 3, got 4",))]
    with pytest.raises(ValueError, match=r"^bad: rank must be 3, got 4$"):
        run_side_by_side(waiting, 2, lambda done: None)
    if (tmp_path / "pid").is_file():
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_process_that_dies_is_reported() -> None:
    with pytest.raises(ChildProcessError, match="process of dead must end with code 0, got -9"):
        run_side_by_side([Job("dead", die, ())], 1, lambda done: None)


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs handles of processes, which Linux has")
def test_processes_end_with_the_one_that_was_killed(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from cram.compare.processes import Job, run_side_by_side;"
        "from tests.cram.compare.test_processes import sleep_on;"
        "run_side_by_side([Job('long', sleep_on, (Path(sys.argv[1]),))], 1, lambda done: None)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    while not (tmp_path / "pid").is_file() and parent.poll() is None:
        time.sleep(0.1)
    child = os.pidfd_open(int((tmp_path / "pid").read_text()))
    try:
        parent.kill()
        parent.wait()
        assert select.select([child], [], [], PATIENCE_S)[0], "the child goes on"
    finally:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(child, signal.SIGKILL)
        os.close(child)
