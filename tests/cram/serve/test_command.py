"""`cram serve` as a process: a run is served, and SIGTERM lets the answers in flight end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cram.bundle.bundle import save
from cram.bundle.runs import newest_bundle
from cram.cli import main, parser_for
from cram.commands import serve
from cram.commands.serve import learn_first
from tests.cram import factories, runs
from tests.cram.serve.engine.test_versions import grown

pytest.importorskip("uvicorn", reason="the server needs the extra `serve`")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clip/, llava/ and the run of a short stream."""
    place = tmp_path_factory.mktemp("place")
    clip = factories.clip_model()
    factories.save_clip(place / "clip", clip)
    runs.save_checkpoint("llava", place / "llava")
    factories.llava(clip=clip).save_pretrained(place / "llava")
    stream = runs.write_stream(place / "data")
    config = [f"{key}={value}" for key, value in runs.SETTINGS.items()]
    source = ["--model", str(place / "llava"), "--clip", str(place / "clip"), "--out", str(place / "run")]
    assert main(["train", *source, "--stream", str(stream), "--config", *config]) == 0
    return place


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def wait_until_healthy(port: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until a server answers."""
    deadline = time.monotonic() + 900
    while True:
        assert process.poll() is None and time.monotonic() < deadline
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
                assert json.load(reply)["status"] == "ok"
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)


def test_a_run_is_served_until_sigterm_and_answers_in_flight_end(trained: Path) -> None:
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "cram", "serve", "--run", str(trained / "run"), "--port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    merged = subprocess.STDOUT
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=merged, env=environment) as process:
        try:
            wait_until_healthy(port, process)
            body = {
                "model": "cram",
                "messages": [{"role": "user", "content": "Which colour"}],
                "max_tokens": 300,
                "stream": True,
            }
            request = urllib.request.Request(
                f"{base}/v1/chat/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=60) as reply:
                assert reply.readline().startswith(b"data: ")
                process.send_signal(signal.SIGTERM)
                lines = [line for line in reply.read().decode().split("\n\n") if line]
            assert lines[-1] == "data: [DONE]"
            last = json.loads(lines[-2].removeprefix("data: "))
            assert last["choices"][0]["finish_reason"] in ("length", "stop")
            assert process.wait(60) in (0, -signal.SIGTERM)
            assert process.stdout is not None
            said = process.stdout.read().decode()
            assert "experts: colour, letter" in said and "Traceback" not in said
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--model", "elsewhere"], "--bundle or --run must be given"),
        (["--run", "."], "must be a run folder"),
        (["--rows", "0"], "rows must be at least 1"),
        (["--drain", "nan"], "drain must be in [0, 86400]"),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: list[str],
    word: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["serve", "--port", "0", *arguments]) == 2
    said = capsys.readouterr().err
    assert word in said and said.count("\n") == 1


def test_a_port_in_use_is_told_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "load_served", lambda arguments: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
    said = capsys.readouterr().err
    assert f"must be free to listen on, got 127.0.0.1:{port}" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("address", "url"),
    [(("127.0.0.1", 8000), "http://127.0.0.1:8000"), (("::1", 80, 0, 0), "http://[::1]:80")],
)
def test_a_browser_can_take_the_address(address: tuple[Any, ...], url: str) -> None:
    place: Any = SimpleNamespace(getsockname=lambda: address)
    assert serve.url_of(place) == url


def test_a_bundle_that_appears_while_the_model_loads_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, processor, _ = factories.routed_llava()
    for age, name in enumerate(("half", "first")):
        save(saved, tmp_path / name)
        os.utime(tmp_path / name / "manifest.json", (1_700_000_000 - age, 1_700_000_000 - age))
    (late,) = (tmp_path / "half" / "experts" / "old").glob("*.safetensors")
    whole = late.read_bytes()
    late.write_bytes(whole[:-10])

    def slow(sources: Any, device: str | None) -> tuple[Any, Any, Any]:
        save(grown()[0], tmp_path / "second")
        clip = factories.clip_model()
        model = factories.llava(clip=clip)
        return model, processor, factories.clip_encoder(model, clip)

    monkeypatch.setattr(serve.Sources, "load", slow)
    kept: list[Any] = []
    monkeypatch.setattr("cram.serve.http.app.create_app", lambda *given: kept.extend(given))
    words = ["serve", "--bundles", str(tmp_path), "--model", "elsewhere", "--watch"]
    arguments = parser_for(words).parse_args(words)
    served = serve.load_served(arguments, serve.watched_bundles(arguments))
    assert served.bundle == tmp_path / "first"
    serve.web_server_of(arguments, served)
    engine, _, _, bundles, _ = kept
    engine.start()
    try:
        for version in (2, 2):
            bundles.poll()
            assert (engine.versions.current.number, len(engine.versions.current.names)) == (version, 4)
        # What was refused at the start is tried again when its files have changed.
        late.write_bytes(whole)
        bundles.poll()
        assert (engine.versions.current.number, len(engine.versions.current.names)) == (3, 3)
    finally:
        engine.stop(10)


def test_bundle_and_run_exclude_each_other() -> None:
    words = ["serve", "--run", "a", "--bundle", "b"]
    with pytest.raises(SystemExit):
        parser_for(words).parse_args(words)


@pytest.mark.slow
def test_a_server_that_was_killed_comes_back_with_its_last_bundle(trained: Path, tmp_path: Path) -> None:
    for place, name in (("01-colour", "one"), ("02-letter", "two"), ("02-letter", "later")):
        shutil.copytree(trained / "run" / "tasks" / place / "bundle", tmp_path / name)
    port, command = free_port(), [sys.executable, "-m", "cram", "serve", "--bundles", str(tmp_path)]
    base = ["--model", str(trained / "llava"), "--clip", str(trained / "clip"), "--port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CRAM_ADMIN_TOKEN": "open"}

    def restarted() -> list[str]:
        """Names of the models of a new server, which is killed after it has loaded the bundle `one`."""
        with subprocess.Popen(
            [*command, *base, "--bundle", str(tmp_path / "two")], env=environment
        ) as process:
            try:
                wait_until_healthy(port, process)
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=30) as reply:
                    names = [each["id"] for each in json.load(reply)["data"]]
                headers = {"Content-Type": "application/json", "Authorization": "Bearer open"}
                address = f"http://127.0.0.1:{port}/v1/cram/bundle"
                urllib.request.urlopen(urllib.request.Request(address, b'{"name": "one"}', headers)).close()
            finally:
                process.kill()
        return names[2:]

    assert restarted() == ["cram:colour", "cram:letter"]
    assert restarted() == ["cram:colour"]
    file = next((tmp_path / "one" / "experts" / "colour").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(urllib.error.HTTPError):  # The damaged one is refused on request, too.
        restarted()


@pytest.mark.slow
def test_the_built_in_tasks_are_learnt_once(tmp_path: Path) -> None:
    settings = {"max_steps": 4, "batch_size": 8, "eval_batch_size": 8}
    learn_first(tmp_path / "run", "cpu", limit=8, **settings)
    bundle, tasks = newest_bundle(tmp_path / "run")
    assert len(tasks) == 6
    before = (bundle / "manifest.json").stat().st_mtime_ns
    learn_first(tmp_path / "run", "cpu", limit=8, **settings)
    assert (bundle / "manifest.json").stat().st_mtime_ns == before
