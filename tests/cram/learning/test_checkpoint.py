"""Checkpoints within a task: every method, every step, damage, full disks, signals."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cram.learning.checkpoint import (
    COMPLETE,
    RECORD,
    STATE,
    Termination,
    _by_step,
    check_complete,
    mark_complete,
    read_checkpoint,
    write_checkpoint,
)
from cram.learning.learner import ContinualLearner, Work
from cram.learning.training import TaskLoop, random_state, set_random_state
from cram.methods import METHODS
from tests.cram import runs
from tests.cram.kills import writes
from tests.cram.runs import results, timeless


class Cut(BaseException):
    """Stands for a process that dies behind a step."""


def cut_at(monkeypatch: pytest.MonkeyPatch, task: str, step: int) -> None:
    """Let the training of a task die behind a step."""
    real = TaskLoop.step

    def dying(loop: TaskLoop, *arguments: Any) -> float:
        if loop.steps.task == task and loop.done == step:
            raise Cut
        return real(loop, *arguments)

    monkeypatch.setattr(TaskLoop, "step", dying)


def learner(out: Path, method: str = "cram", every: int = 1, **options: Any) -> ContinualLearner:
    made = runs.learner(out, method, **options)
    made._work = Work(checkpoint_every=every)
    return made


def cuts() -> Iterator[Any]:
    """Every method is cut in the middle; the warm-up of CRAM holds other things, so it is cut as well."""
    for method in METHODS:
        for step in (1, 2, 3):
            quick = step == 3 or (method, step) == ("cram", 1)
            yield pytest.param(method, step, marks=[] if quick else pytest.mark.slow)


@pytest.mark.parametrize(("method", "step"), list(cuts()))
def test_a_task_goes_on_within_itself(
    method: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout: the random state is a part of the checkpoint. Step 2 is where CRAM's stages change."""
    whole = learner(tmp_path / "whole", method, every=0).run()
    with monkeypatch.context() as patch:
        cut_at(patch, "letter", step)
        with pytest.raises(Cut):
            learner(tmp_path / "parts", method).run()
    made = learner(tmp_path / "parts", method)
    told: list[str] = []
    monkeypatch.setattr(made, "_say", told.append)
    again = made.run()
    assert any(line.startswith(f"resuming task letter after step {step} ") for line in told)
    assert timeless(again) == timeless(whole)
    assert results(tmp_path / "parts") == results(tmp_path / "whole")
    assert not list((tmp_path / "parts").rglob("checkpoints"))


def test_a_process_takes_its_own_row_of_random_states() -> None:
    torch.manual_seed(1)
    other = random_state()["random.cpu"]
    torch.manual_seed(2)
    own, wanted = random_state()["random.cpu"], torch.rand(3)
    set_random_state({"random.cpu": torch.stack([other, own])[1]})
    assert torch.equal(torch.rand(3), wanted)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that died behind the third step of its second task, with checkpoints after steps 2 and 3."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        cut_at(patch, "letter", 3)
        with pytest.raises(Cut):
            learner(out).run()
    return out


def test_the_newest_complete_checkpoint_is_taken_and_named(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    folder = run / "tasks/02-letter/checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-000002", "step-000003"]
    state = folder / "step-000003" / STATE
    whole = state.read_bytes()
    state.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    made = learner(run)
    made._shown = True
    report = made.run()
    said = capsys.readouterr().out
    assert "step-000003 is passed over" in said
    assert f"resuming task letter after step 2 ({folder / 'step-000002'})" in said
    whole = learner(tmp_path / "whole", every=0).run()
    assert timeless(report) == timeless(whole)


@pytest.mark.parametrize("other", ["identity", "before"])
def test_a_checkpoint_of_something_else_is_passed_over(stopped: Path, tmp_path: Path, other: str) -> None:
    folder = Path(shutil.copytree(stopped / "tasks/02-letter/checkpoints/step-000003", tmp_path / "c"))
    of = learner(Path(shutil.copytree(stopped, tmp_path / "run")))._checkpoints(1)._of
    read_checkpoint(folder, of)
    with pytest.raises(ValueError, match=f"got another {other}"):
        read_checkpoint(folder, {**of, other: "else"})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / STATE).write_bytes(b""), "must be as checkpoint.json says"),
        (lambda folder: (folder / RECORD).write_text("{}"), "must have the keys"),
        (lambda folder: (folder / RECORD).write_text("{"), "must be a JSON file"),
        (lambda folder: (folder / STATE).unlink(), "No such file"),
    ],
)
def test_a_damaged_checkpoint_is_refused(damage: Any, words: str, tmp_path: Path) -> None:
    import torch

    folder = tmp_path / "step-000001"
    write_checkpoint(folder, {"a": torch.ones(3)}, {"n": 1}, {"identity": "x"})
    tensors, values = read_checkpoint(folder, {"identity": "x"})
    assert tensors["a"].tolist() == [1, 1, 1] and values == {"n": 1}
    damage(folder)
    with pytest.raises((ValueError, OSError), match=words):
        read_checkpoint(folder, {"identity": "x"})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "deep/a").write_bytes(b"other"), "deep/a must be as .* says, got none or"),
        (lambda folder: (folder / "deep/a").unlink(), "deep/a must be as .* says, got none or"),
        (lambda folder: (folder / COMPLETE).write_text("[]"), "must list files, got none"),
        (lambda folder: (folder / COMPLETE).write_text("{"), "must be a JSON file"),
        (lambda folder: (folder / COMPLETE).unlink(), "must be a complete checkpoint"),
    ],
)
def test_a_checkpoint_of_another_program_is_complete_as_it_was_marked(
    damage: Any, words: str, tmp_path: Path
) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/a").write_bytes(b"first")
    mark_complete(tmp_path)
    check_complete(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=words):
        check_complete(tmp_path)


def test_a_full_disk_is_one_error_and_loses_nothing(stopped: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    with writes(at=6, full=True), pytest.raises(OSError, match="No space left"):
        learner(run).run()
    report = learner(run).run()
    assert timeless(report) == timeless(learner(tmp_path / "whole", every=0).run())


@pytest.mark.parametrize(
    ("step", "said"), [(3, "stopped after step 3 of letter"), (5, "stopped behind task letter")]
)
def test_sigterm_ends_a_training_behind_a_checkpoint_or_the_bundle(
    step: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = learner(tmp_path / "whole", every=0).run()
    real = TaskLoop.step

    def signalled(loop: TaskLoop, *arguments: Any) -> float:
        found = real(loop, *arguments)
        if loop.steps.task == "letter" and loop.done == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(TaskLoop, "step", signalled)
        with pytest.raises(KeyboardInterrupt, match=f"{said}; the same command"):
            learner(tmp_path / "run", every=0).run()
    kept = sorted(path.name for path in (tmp_path / "run/tasks/02-letter").glob("checkpoints/*"))
    assert kept == (["step-000003"] if step == 3 else [])
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert timeless(learner(tmp_path / "run", every=0).run()) == timeless(whole)


def test_sigterm_outside_of_training_ends_at_once() -> None:
    ending = Termination()
    with pytest.raises(KeyboardInterrupt, match="stopped; the same command"), ending:
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with ending:
        assert not ending.arrived


def test_work_of_too_small_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match="forwards must be at least 1 .* got 0 and 200"):
        Work(forwards=0)
    with pytest.raises(ValueError, match="checkpoint_every at least 0, got 1 and -1"):
        Work(checkpoint_every=-1)


def test_the_newest_of_many_steps_comes_first(tmp_path: Path) -> None:
    names = ["step-000002", "step-999999", "step-1000000"]
    for name in names:
        (tmp_path / name).mkdir()
    assert [path.name for path in _by_step(tmp_path, "step-")] == names[::-1]
