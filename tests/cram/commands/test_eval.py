"""`cram eval`: which samples it tests on, and where the results go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cram.cli import main
from cram.commands import eval as command
from cram.streams import Stream
from tests.cram import factories, runs


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clip/, llava/, data/, other/ and run/, whose settings are a limit, a data root and another order."""
    folder = tmp_path_factory.mktemp("place")
    clip = factories.clip_model()
    factories.save_clip(folder / "clip", clip)
    factories.llava(clip=clip).save_pretrained(folder / "llava")
    factories.llava_processor().save_pretrained(folder / "llava")
    for name in ("data", "other"):
        runs.write_stream(folder / name)
    base = ["--model", str(folder / "llava"), "--clip", str(folder / "clip")]
    config = [f"{key}={value}" for key, value in runs.SETTINGS.items()]
    stream = ["--stream", str(folder / "data/stream.yaml"), "--data-root", str(folder / "data")]
    chosen = ["--limit", "3", "--order", "1", "--config", *config]
    assert main(["train", *base, "--out", str(folder / "run"), *stream, *chosen]) == 0
    return folder


@pytest.fixture
def tested(monkeypatch: pytest.MonkeyPatch) -> list[Stream]:
    """The streams of the evaluations; none is run."""
    found: list[Stream] = []

    def keep(folder: Path, stream: Stream, *rest: Any) -> dict[str, float]:
        found.append(stream)
        return {}

    monkeypatch.setattr(command, "evaluate_run", keep)
    return found


def test_another_stream_has_nothing_of_the_runs_settings(place: Path, tested: list[Stream]) -> None:
    other = place / "other/stream.yaml"
    assert main(["eval", str(place / "run"), "--stream", str(other)]) == 0
    assert main(["eval", str(place / "run"), "--stream", str(other), "--limit", "2"]) == 0
    assert main(["eval", str(place / "run"), "--stream", str(other), "--data-root", str(place / "data")]) == 0
    whole, limited, rooted = tested
    assert [task.name for task in whole.tasks] == ["colour", "letter"]
    assert [len(task.test) for task in whole.tasks] == [5, 5]
    assert [len(task.test) for task in limited.tasks] == [2, 2]
    for stream, root in ((whole, "other"), (limited, "other"), (rooted, "data")):
        assert {image.parent for task in stream.tasks for s in task.test for image in s.images} == {
            place / root
        }


def test_the_runs_own_stream_has_its_settings(place: Path, tested: list[Stream]) -> None:
    assert main(["eval", str(place / "run")]) == 0
    assert main(["eval", str(place / "run"), "--limit", "2"]) == 0
    own, limited = tested
    assert [task.name for task in own.tasks] == ["letter", "colour"]
    assert [len(task.test) for task in own.tasks] == [3, 3]
    assert [len(task.test) for task in limited.tasks] == [2, 2]
