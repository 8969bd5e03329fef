"""Which bundle is served: by name, by watching, and after a restart."""

from __future__ import annotations

import json
import os
import shutil
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cram.atomic import write_json
from cram.bundle.bundle import save
from cram.serve.bundles import SERVED, Bundles, Watch, bundles_at_start, stamps
from cram.serve.engine.engine import Engine
from cram.serve.request import QueueFullError, RequestError
from tests.cram.factories import routed_llava
from tests.cram.serve.engine.test_versions import damage, grown


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with the bundles three, four and the damaged broken, in the order of their time."""
    save(routed_llava()[0], tmp_path / "three")
    save(grown()[0], tmp_path / "four")
    save(routed_llava()[0], tmp_path / "broken")
    damage(tmp_path / "broken")
    for age, name in enumerate(("broken", "four", "three")):
        stamp = 1_700_000_000 - 100 * age
        os.utime(tmp_path / name / "manifest.json", (stamp, stamp))
    return tmp_path


@pytest.fixture
def running(root: Path) -> Any:
    """A started engine and what changes its bundle."""
    model, processor, _ = routed_llava()
    engine = Engine(model, processor)
    bundles = Bundles(engine, model, root, Watch(partial(stamps, root)), root / "three")
    engine.start()
    yield engine, bundles
    engine.stop(10)


def served(root: Path) -> str:
    """The name that a restart goes by."""
    name: str = json.loads((root / SERVED).read_text())["name"]
    return name


def test_a_restart_begins_with_the_bundle_that_was_served_last(root: Path, running: Any) -> None:
    engine, bundles = running
    assert served(root) == "three"
    assert bundles.use("four").names == ("old", "other", "new", "newest")
    assert served(root) == "four"
    assert [each.name for each in bundles_at_start(root, None)] == ["four", "broken", "three"]
    assert bundles_at_start(root, Path("given")) == [root / "four", Path("given")]
    with pytest.raises(RequestError, match="bundle broken was refused"):
        bundles.use("broken")
    assert served(root) == "four" and len(engine.versions.current.names) == 4
    assert len(bundles.roll_back().names) == 3
    assert served(root) == "three"


@pytest.mark.parametrize("content", ["{", '{"name": "../three"}', '{"name": "gone"}', "[]", '{"name": 1}'])
def test_a_damaged_note_of_the_served_bundle_is_passed_over(root: Path, content: str) -> None:
    (root / SERVED).write_text(content)
    assert [each.name for each in bundles_at_start(root, None)] == ["broken", "four", "three"]
    assert bundles_at_start(root, root / "three") == [root / "three"]


def test_a_watched_folder_brings_new_bundles_and_no_bad_ones(root: Path, running: Any) -> None:
    engine, bundles = running
    bundles.poll()
    assert engine.versions.current.number == 1
    save(grown()[0], root / "five")
    bundles.poll()
    assert len(engine.versions.current.names) == 4 and served(root) == "five"
    save(routed_llava()[0], root / "six")
    damage(root / "six")
    for _ in range(2):
        bundles.poll()
    assert engine.versions.current.number == 2 and served(root) == "five"
    # The same name with new content is a new bundle.
    save(routed_llava()[0], root / "six")
    bundles.poll()
    assert engine.versions.current.number == 3 and served(root) == "six"


def test_a_bundle_that_is_being_copied_is_loaded_when_it_is_whole(root: Path, running: Any) -> None:
    engine, bundles = running
    source = root / "four"
    late = next((source / "experts" / "newest").glob("*.safetensors")).relative_to(source)
    shutil.copytree(source, root / "copy")
    (root / "copy" / late).unlink()
    bundles.poll()
    assert engine.versions.current.number == 1 and served(root) == "three"
    for cut in (-10, None):
        (root / "copy" / late).write_bytes((source / late).read_bytes()[:cut])
        bundles.poll()
    assert served(root) == "copy" and len(engine.versions.current.names) == 4
    # Another file in the folder of an older bundle is no reason to serve that one.
    save(routed_llava()[0], root / "five")
    bundles.poll()
    (root / "copy" / "notes.txt").write_text("old")
    bundles.poll()
    assert served(root) == "five"


def test_what_disappears_while_it_is_looked_at_is_no_bundle(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = sorted(root.iterdir())
    monkeypatch.setattr(Path, "iterdir", lambda self: iter([*listed, root / "gone"]))
    assert sorted(each.folder.name for each in stamps(root)) == ["broken", "four", "three"]


def test_a_folder_that_cannot_be_written_is_served_all_the_same(
    root: Path, running: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: Any) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr("cram.serve.bundles.write_json", refuse)
    _, bundles = running
    assert len(bundles.use("four").names) == 4
    assert "a restart will not know that four is served" in caplog.text


@pytest.mark.parametrize("second", ["load", "roll back"])
def test_of_two_changes_at_once_the_last_one_is_on_record(
    root: Path, running: Any, monkeypatch: pytest.MonkeyPatch, second: str
) -> None:
    engine, bundles = running
    save(routed_llava()[0], root / "five")
    writing, go, written = threading.Event(), threading.Event(), threading.Event()

    def late(path: Path, value: dict[str, str]) -> None:
        if value["name"] == "four":
            writing.set()
            assert go.wait(30)
        write_json(path, value)
        if value["name"] != "four":
            written.set()

    monkeypatch.setattr("cram.serve.bundles.write_json", late)
    change = partial(bundles.use, "five") if second == "load" else bundles.roll_back
    threads = [threading.Thread(target=partial(bundles.use, "four")), threading.Thread(target=change)]
    threads[0].start()
    assert writing.wait(30)
    threads[1].start()
    assert not written.wait(1)
    go.set()
    for thread in threads:
        thread.join(30)
    current = bundles._folders[engine.versions.current.number].name
    assert current == served(root) == ("five" if second == "load" else "three")


def test_of_several_new_bundles_the_newest_good_one_is_loaded(root: Path, running: Any) -> None:
    engine, bundles = running
    for age, name in enumerate(("bad", "good", "old")):
        save(grown()[0] if name == "good" else routed_llava()[0], root / name)
        stamp = 1_800_000_000 - 100 * age
        os.utime(root / name / "manifest.json", (stamp, stamp))
    damage(root / "bad")
    for _ in range(2):
        bundles.poll()
        assert engine.versions.current.number == 2 and served(root) == "good"
    shutil.copytree(root / "good", root / "bad", dirs_exist_ok=True)
    bundles.poll()
    assert served(root) == "bad"


def test_a_bundle_that_the_engine_had_no_time_for_is_tried_again(
    root: Path, running: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, bundles = running
    save(grown()[0], root / "five")

    def refuse(load: Any) -> Any:
        raise QueueFullError("the server takes no more requests")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "replace", refuse)
        with pytest.raises(QueueFullError):
            bundles.poll()
    bundles.poll()
    assert served(root) == "five"
