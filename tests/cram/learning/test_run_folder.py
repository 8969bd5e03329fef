"""A run folder under kills, a full disk, damaged records and a second writer."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cram import cli
from cram.atomic import LOCK, locked, read_json, write_json
from cram.bundle.records import sealed
from cram.bundle.runs import newest_bundle, read_run
from cram.learning.run_folder import RunFolder, stream_identity, trained_parameters
from cram.streams.types import Sample, Stream, Task
from tests.cram import runs
from tests.cram.kills import GROWING, Killed, every_end, writes
from tests.cram.runs import timeless

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over two tasks, not to be written to."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    runs.learner(folder).run()
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_the_newest_bundle_is_that_of_the_last_trained_task(run: Path) -> None:
    tasks = read_run(run)["identity"]["stream"]["tasks"]
    assert newest_bundle(run) == (run / "tasks/02-letter/bundle", tasks)
    shutil.rmtree(run / "tasks/02-letter/bundle")
    assert newest_bundle(run) == (run / "tasks/01-colour/bundle", tasks[:1])


def first_writes(folder: RunFolder, identity: dict[str, Any]) -> None:
    """What a run writes before its first bundle."""
    folder.check_identity(identity)
    with folder.writing():
        folder.write_identity(identity, {})
        folder.write_training(0, 1.0, 0.5)


def test_a_kill_or_a_full_disk_at_the_very_first_writes_leaves_a_run_that_goes_on(
    finished: Path, tmp_path: Path
) -> None:
    identity = read_run(finished)["identity"]
    folder = RunFolder(tmp_path / "run", runs.two_tasks())

    def restore() -> None:
        shutil.rmtree(folder.path, ignore_errors=True)

    def work() -> None:
        first_writes(folder, identity)

    ends = 0
    for _ in every_end(work, restore):
        work()
        assert read_run(folder.path)["identity"] == identity
        assert folder.training(0) == {"seconds": 1.0, "loss": 0.5}
        assert not (folder.path / LOCK).exists()
        ends += 1
    assert ends >= 16
    restore()
    with writes() as counted:
        work()
    growing = [point for point, write in enumerate(counted) if write.split()[0] in GROWING]
    for point in growing:
        restore()
        with writes(point, full=True), pytest.raises(OSError, match="No space left"):
            work()
        work()
        assert folder.training(0) == {"seconds": 1.0, "loss": 0.5}


def edit(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Rewrites a record by a function that changes it or gives another one."""

    def apply(run: Path) -> None:
        data = read_json(run / name)
        changed = change(data)
        (run / name).write_text(json.dumps(data if changed is None else changed))

    return apply


def rewrite(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Writes a changed record as the package would write it."""

    def apply(run: Path) -> None:
        data = read_json(run / name)
        del data["sha256"]
        change(data)
        write_json(run / name, sealed(data))

    return apply


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda run: (run / name).write_text(content)


def test_a_record_of_no_number_is_never_sealed() -> None:
    """JSON has neither NaN nor infinities."""
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            sealed({"loss": value})


FIRST, SECOND = "tasks/01-colour", "tasks/02-letter"
IDENTITY: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (text("run.json", ""), r"run\.json must be a JSON file"),
    "not an object": (edit("run.json", lambda d: [1]), r"run\.json must have the keys"),
    "no identity": (edit("run.json", lambda d: d.update(identity={})), "identity must have the keys"),
    "a method that is a number": (
        edit("run.json", lambda d: d["identity"].update(method=1)),
        "method must be a str",
    ),
    "an unknown setting": (
        edit("run.json", lambda d: d["identity"]["config"].update(x=1)),
        "config keys must be",
    ),
    "a rank of text": (
        edit("run.json", lambda d: d["identity"]["config"].update(rank="9")),
        "rank must be a int",
    ),
    "tasks of numbers": (
        edit("run.json", lambda d: d["identity"]["stream"].update(tasks=[1, 2])),
        "tasks must be distinct names",
    ),
    "a task outside": (
        edit("run.json", lambda d: d["identity"]["stream"].update(tasks=["../../x"])),
        "name must match",
    ),
    "a newer format": (edit("run.json", lambda d: d.update(format=9)), "format of .* must be 1, got 9"),
}


@pytest.mark.parametrize("name", IDENTITY)
def test_a_damaged_identity_is_one_line_for_every_command(
    run: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = IDENTITY[name]
    damage(run)
    for read in (read_run, newest_bundle, lambda run: RunFolder(run, runs.two_tasks()).check_identity({})):
        with pytest.raises(ValueError, match=rf"run\.json.*{message}|{message}") as refused:
            read(run)
        assert "\n" not in str(refused.value) and "run.json" in str(refused.value)
    assert cli.main(["info", str(run)]) == 2
    assert "run.json" in capsys.readouterr().err


def test_eval_of_a_run_without_settings_is_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "--run", str(run)]) == 2
    assert "must have the settings that `cram train` writes, got no ['stream'" in capsys.readouterr().err


def swap(run: Path) -> None:
    one, two, spare = run / FIRST / "bundle", run / SECOND / "bundle", run / "spare"
    one.rename(spare)
    two.rename(one)
    spare.rename(two)


EARLIER: dict[str, tuple[Callable[[Path], None], str]] = {
    "accuracy of 200": (
        edit(f"{FIRST}/result.json", lambda d: d.update(accuracies=[200.0])),
        r"accuracy on colour must be a finite number from 0 to 100, got 200\.0",
    ),
    "accuracy of text": (
        edit(f"{FIRST}/result.json", lambda d: d.update(accuracies=["1"])),
        "accuracy on colour",
    ),
    "too many accuracies": (
        edit(f"{FIRST}/result.json", lambda d: d.update(accuracies=[1, 2])),
        "must be 1, got",
    ),
    "no routing": (edit(f"{FIRST}/result.json", lambda d: d.pop("routing") and None), "must have the keys"),
    "a negative entropy": (
        edit(f"{FIRST}/result.json", lambda d: d["routing"]["colour"].update(gate_entropy=-1)),
        "gate_entropy must be a finite number from 0",
    ),
    "a result that is a list": (edit(f"{FIRST}/result.json", lambda d: [1]), "must have the keys"),
    "a result cut short": (text(f"{FIRST}/result.json", '{"acc'), "must be a JSON file"),
    "training of text": (
        edit(f"{FIRST}/training.json", lambda d: d.update(seconds="1")),
        "seconds must be a int or",
    ),
    "no training": (lambda run: (run / FIRST / "training.json").unlink(), "training.json"),
    "another accuracy": (
        edit(f"{FIRST}/result.json", lambda d: d.update(accuracies=[33.0])),
        r"result\.json must hold the values that were written, got others than its sha256 tells",
    ),
    "another loss": (
        edit(f"{FIRST}/training.json", lambda d: d.update(loss=1.5)),
        r"training\.json must hold the values that were written",
    ),
    "a sha256 of text": (
        edit(f"{FIRST}/training.json", lambda d: d.update(sha256="0")),
        r"training\.json must hold the values that were written",
    ),
    "another training": (
        rewrite(f"{FIRST}/training.json", lambda d: d.update(seconds=d["seconds"] + 1)),
        r"must belong to the files beside it, got the result of another \['training'\]",
    ),
    "bundles swapped": (swap, r"must belong to the files beside it, got the result of another \['bundle'\]"),
    "a huge manifest": (
        lambda run: os.truncate(run / FIRST / "bundle/manifest.json", 64 << 30),
        r"manifest\.json must be a file of at most \d+ bytes, got 68719476736",
    ),
    "no bundle": (lambda run: shutil.rmtree(run / FIRST / "bundle"), "01-colour must be whole"),
    "no result": (lambda run: (run / FIRST / "result.json").unlink(), "01-colour must be whole"),
}


def test_records_of_earlier_versions_have_no_sha256(run: Path) -> None:
    for name in ("training", "result"):
        edit(f"{FIRST}/{name}.json", lambda d: d.pop("sha256") and None)(run)
    edit(f"{FIRST}/result.json", lambda d: d.pop("of") and None)(run)
    RunFolder(run, runs.two_tasks()).check_earlier()


@pytest.mark.parametrize("name", EARLIER)
def test_damage_of_an_earlier_task_is_one_line_with_the_way_out(run: Path, name: str) -> None:
    damage, message = EARLIER[name]
    damage(run)
    folder = RunFolder(run, runs.two_tasks())
    with pytest.raises(ValueError, match=rf"{message}.*; put it back, or move 01-colour and") as refused:
        folder.check_earlier()
    assert "\n" not in str(refused.value) and "01-colour" in str(refused.value)


def test_a_run_refuses_damage_of_an_earlier_task(run: Path) -> None:
    EARLIER["bundles swapped"][0](run)
    with pytest.raises(ValueError, match="must belong to the files beside it"):
        runs.learner(run).run()


def test_the_newest_task_is_tested_or_learnt_again(
    run: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text(f"{SECOND}/result.json", "{")(run)
    made = runs.learner(run)
    made._shown = True
    report = made.run()
    assert "task 2 is tested again" in capsys.readouterr().out
    assert timeless(report) == timeless(read_json(finished / "report.json"))
    edit(f"{SECOND}/training.json", lambda d: {})(run)
    made = runs.learner(run)
    made._shown = True
    report = made.run()
    assert "task 2 is damaged and learnt again" in capsys.readouterr().out
    assert timeless(report) == timeless(read_json(finished / "report.json"))


def test_a_folder_in_the_place_of_the_newest_result_is_set_aside_before_any_work(
    run: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run / SECOND / "result.json"
    result.unlink()
    (result / "inside").mkdir(parents=True)
    made = runs.learner(run)
    made._shown = True
    report = made.run()
    assert "task 2 is tested again" in capsys.readouterr().out
    assert (run / SECOND / "damaged-result.json" / "inside").is_dir() and result.is_file()
    assert timeless(report) == timeless(read_json(finished / "report.json"))


def test_a_result_without_its_bundle_is_learnt_again_and_said(
    run: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / SECOND / "bundle")
    made = runs.learner(run)
    made._shown = True
    report = made.run()
    assert "task 2 has a result without its bundle and is learnt again" in capsys.readouterr().out
    assert (run / "tasks/damaged-02-letter/result.json").is_file()
    assert timeless(report) == timeless(read_json(finished / "report.json"))


def test_a_second_writer_is_told_who_holds_the_folder(run: Path) -> None:
    with (
        locked(run),
        pytest.raises(ValueError, match=rf"must have one writer, got process {os.getpid()} at work"),
    ):
        runs.learner(run).run()
    assert runs.learner(run).run()["stream"] == "toy"


HOLD = """
import sys, time
from pathlib import Path
from cram.atomic import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_hold_dies_with_its_process(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=rf"got process {process.pid} at work"), locked(folder):
            pass
        process.send_signal(signal.SIGKILL)
    with locked(folder):
        (folder / "x").write_text("")
    assert [path.name for path in folder.iterdir()] == ["x"]


def test_a_hold_takes_an_empty_folder_away(tmp_path: Path) -> None:
    with pytest.raises(Killed), locked(tmp_path / "run"):
        raise Killed
    assert not (tmp_path / "run").exists()


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("notes")
    with pytest.raises(ValueError, match=r"out must be a folder, got the file .*run"):
        RunFolder(tmp_path / "run", runs.two_tasks()).check_identity({})
    assert (tmp_path / "run").read_text() == "notes"


def test_the_state_before_a_task_is_the_bundle_of_the_one_before(finished: Path) -> None:
    folder = RunFolder(finished, runs.two_tasks())
    manifest = (finished / "tasks/01-colour/bundle/manifest.json").read_bytes()
    assert folder.state_before(0) == "" and folder.state_before(1) == hashlib.sha256(manifest).hexdigest()


@pytest.mark.parametrize("method", ["cram", "moelora", "same", "keeplora"])
def test_every_trained_value_counts_once_and_for_its_task(method: str, tmp_path: Path) -> None:
    made = runs.learner(tmp_path / "run", method)
    made.run()
    counts = trained_parameters(made.method, ["colour", "letter"])
    sides = slice(1 if method == "keeplora" else 0, 2)  # its A is chosen and never trained
    factors = [
        sum(side.numel() for pair in made.cram.expert_weights(index).values() for side in pair[sides])
        for index in range(made.cram.num_experts)
    ]
    beside = made.method.values_per_expert()
    gatings = [m.gating.weight for m in made.cram.modules.values() if m.gating is not None]
    routers = sum(weight.numel() for weight in gatings)
    if method == "moelora":  # one pool, which counts for the first task
        assert counts == {"colour": sum(factors) + routers, "letter": 0}
    else:
        assert counts == {"colour": factors[0] + beside + routers, "letter": factors[1] + beside}
    report = read_json(tmp_path / "run/report.json")["methods"][method]["parameters"]
    assert report == {"total": sum(counts.values()), "per_task": counts}


def test_the_identity_of_a_stream_has_its_splits_the_learnt_answers_and_the_rule() -> None:
    def identity(train: list[Sample], test: list[Sample], published: str | None = None) -> dict[str, Any]:
        return stream_identity(Stream("s", (Task("t", train, test, "accuracy", 4, published),)))

    said = [Sample(str(i), (), "q", "cat", ("cat", "dog")) for i in range(4)]
    other = replace(said[0], answer="dog")
    found = [
        identity(said[:3], said[3:]),
        identity(said[:2], said[2:]),
        identity([other, *said[1:3]], said[3:]),
        identity(said[:3], said[3:], "mcitlib_accuracy"),
    ]
    assert len({each["splits"] for each in found}) == 4
    assert found[0] == identity(said[:3], said[3:])
