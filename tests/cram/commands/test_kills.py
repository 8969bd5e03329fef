"""`cram train` and `cram eval`: kill -9 at random moments, launched processes, and signals."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cram.atomic import read_json
from cram.cli import main
from tests.cram import factories, runs
from tests.cram.runs import results, timeless

KILLS = 30
SETTINGS = {**runs.SETTINGS, "max_steps": 8, "eval_batch_size": 2}
CONFIG = [f"{key}={value}" for key, value in SETTINGS.items()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clip/, llava/ and data/; not to be written to."""
    folder = tmp_path_factory.mktemp("place")
    clip = factories.clip_model()
    factories.save_clip(folder / "clip", clip)
    factories.llava(clip=clip).save_pretrained(folder / "llava")
    factories.llava_processor().save_pretrained(folder / "llava")
    runs.write_stream(folder / "data")
    return folder


def train(place: Path, out: Path, *more: str) -> list[str]:
    base = ["--model", str(place / "llava"), "--clip", str(place / "clip"), "--device", "cpu"]
    stream = ["--stream", str(place / "data/stream.yaml"), "--checkpoint-every", "1"]
    return ["train", *base, *stream, "--out", str(out), *more, "--config", *CONFIG]


def forked(arguments: list[str]) -> multiprocessing.Process:
    """The command in a process of its own, which has everything imported already."""
    process = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(main(arguments)))
    process.start()
    return process


def kill_at_random(arguments: list[str], seconds: float, kills: int, seed: int) -> int:
    """Start a command again and again and kill it, up to `kills` times; returns how often it was killed."""
    moments, killed = random.Random(seed), 0
    while killed < kills:
        process = forked(arguments)
        process.join(moments.uniform(0, seconds))
        if process.exitcode is not None:
            assert process.exitcode == 0
            return killed
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        killed += 1
    return killed


def timed(arguments: list[str]) -> float:
    started = time.monotonic()
    process = forked(arguments)
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - started


@pytest.mark.slow
def test_thirty_kills_change_nothing(place: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    learning = timed(train(place, whole))
    testing = timed(["eval", "--run", str(whole), "--device", "cpu"])
    killed, attempt = 0, 0
    while killed < KILLS:
        attempt += 1
        run = tmp_path / f"run{attempt}"
        # A run that makes no step between two kills would never end.
        killed += kill_at_random(train(place, run), learning, (KILLS - killed + 1) // 2, seed=attempt)
        assert timed(train(place, run))
        test = ["eval", "--run", str(run), "--device", "cpu"]
        killed += kill_at_random(test, testing, KILLS - killed, seed=-attempt)
        assert timed(test)
        assert timeless(read_json(run / "report.json")) == timeless(read_json(whole / "report.json"))
        assert results(run) == results(whole)
        found, wanted = (read_json(folder / "eval/filed/result.json") for folder in (run, whole))
        assert {**found, "seconds": 0} == {**wanted, "seconds": 0}
        left = [path.name for path in run.rglob(".*") if path.name != ".lock"]
        assert not [name for name in left if "part" in name and "partial" not in name], left


def test_eval_wants_one_run(capsys: pytest.CaptureFixture[str]) -> None:
    for words, got in (([], "none"), (["a", "--run", "b"], "both")):
        assert main(["eval", *words]) == 2
        assert f"the run folder must be given, once, got {got}" in capsys.readouterr().err


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


@pytest.mark.slow
def test_two_launched_processes_learn_as_one(place: Path, tmp_path: Path) -> None:
    """torchrun, the command itself, without dropout, whose masks are each process's own."""
    one, two = tmp_path / "one", tmp_path / "two"
    still = ["dropout=0.0", "batch_size=4"]
    assert main([*train(place, one), *still]) == 0
    launch = python("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29631")
    for command in ([*train(place, two), *still], ["eval", str(two), "--device", "cpu"]):
        done = subprocess.run([*launch, "-m", "cram", *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    left, right = (read_json(folder / "report.json")["methods"]["cram"] for folder in (one, two))
    assert left["groups"] == right["groups"] and left["ranks"] == right["ranks"]
    assert left["matrix"] == right["matrix"]
    for task in ("01-colour", "02-letter"):
        losses = [read_json(folder / f"tasks/{task}/training.json")["loss"] for folder in (one, two)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    row = read_json(two / "eval/filed/result.json")["accuracies"]
    assert list(row.values()) == right["matrix"][-1]


@pytest.mark.slow
def test_a_signal_is_one_line_and_a_second_writer_too(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = python("-m", "cram", *train(place, run), "max_steps=400")
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not list(run.rglob("step-*/checkpoint.json")):
        assert process.poll() is None
        time.sleep(0.05)
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert second.stderr.startswith(f"cram: {run} must have one writer, got process {process.pid}")
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 130
    last = said.strip().splitlines()[-1]
    assert last.startswith("cram: stopped after step ") and last.endswith(
        "the same command goes on from there"
    )
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    resumed = next(line for line in process.stdout if line.startswith("resuming task"))
    assert "after step " in resumed
    process.kill()
    process.communicate()
