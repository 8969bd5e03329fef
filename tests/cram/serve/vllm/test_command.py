"""`cram serve --engine vllm`: the command that it shows, what it refuses, and the files for more machines."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from cram.cli import main
from cram.serve.vllm import command
from cram.serve.vllm.export import exported
from cram.serve.vllm.front import middleware, replace
from tests.cram import factories
from tests.cram.serve.vllm.bundles import small_bundle

ROOT = Path(__file__).resolve().parents[4]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle, beside its base `base` and `other`, a base of the same shape."""
    place = tmp_path_factory.mktemp("place")
    small_bundle(place / "bundle")
    factories.llava(clip=factories.clip_model()).save_pretrained(place / "base")
    factories.llava(seed=1, clip=factories.clip_model()).save_pretrained(place / "other")
    return place / "bundle"


def options(words: list[str]) -> dict[str, list[str]]:
    """Option -> its values, the last one where it stands twice."""
    found: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name = word
            found[name] = []
        else:
            found.setdefault(name, []).append(word)
    return found


def test_the_printed_command_has_everything(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "serve",
        "--engine",
        "vllm",
        "--model",
        "base-model",
        "--bundle",
        str(bundle),
        "--clip",
        "a clip",
    ]
    words += [
        "--bundles",
        "more",
        "--port",
        "8001",
        "--print",
        "--",
        "--lora-modules",
        "mine=/x",
        "--seed",
        "3",
    ]
    assert main(words) == 0
    variables, _, line = capsys.readouterr().out.strip().partition(" vllm serve ")
    given = options(shlex.split(line))
    adapters = exported(bundle, bundle.parent / "bundle-vllm")
    assert len(adapters) == 2 and given[""] == ["base-model"]
    places = [f"{adapter.name}={bundle.parent / 'bundle-vllm' / adapter.name}" for adapter in adapters]
    assert given["--lora-modules"] == [*places, "mine=/x"]
    assert given["--max-loras"] == ["3"] and given["--max-lora-rank"] == ["8"]
    assert given["--served-model-name"] == [middleware.BASE] and given["--port"] == ["8001"]
    assert given["--generation-config"] == ["vllm"]
    assert given["--override-generation-config"] == ['{"temperature": 0.0}']
    assert given["--mm-processor-cache-gb"] == ["0"]
    assert given["--seed"] == ["3"] and given["--enable-lora"] == [] and "--dtype" not in given
    module, _, name = given["--middleware"][0].rpartition(".")
    assert getattr(__import__(module, fromlist=[name]), name) is middleware.CramMiddleware
    set_for_it = dict(pair.split("=", 1) for pair in shlex.split(variables))
    assert set_for_it == {
        middleware.BUNDLE: str(bundle),
        middleware.EXPORT: str(bundle.parent / "bundle-vllm"),
        middleware.CLIP: "a clip",
        replace.BUNDLES: "more",
    }


def test_vllm_gets_the_command_and_the_environment(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(command, "installed_version", lambda: "0.33.1")
    monkeypatch.setattr(command.shutil, "which", lambda name, path: f"/somewhere/{name}")
    monkeypatch.setattr(os, "execve", lambda *given: seen.extend(given))
    words = ["serve", "--engine", "vllm", "--bundle", str(bundle), "--dtype", "bfloat16"]
    assert main([*words, "--model", str(bundle.with_name("base"))]) == 0
    program, arguments, environment = seen
    assert program == arguments[0] == "/somewhere/vllm" and arguments[-2:] == ["--dtype", "bfloat16"]
    assert environment[middleware.BUNDLE] == str(bundle) and environment["PATH"] == os.environ["PATH"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--engine", "vllm"], "--run, or --bundle with --model, must be given"),
        (["--engine", "vllm", "--run", "r", "--watch"], "--watch must stand without --engine vllm"),
        (["--engine", "vllm", "--run", "r", "--gate-floor", "0.1"], "--gate-floor must stand without"),
        (
            ["--engine", "vllm", "--model", "m", "--bundle", "BUNDLE", "--rows", "3"],
            "--rows must stand without",
        ),
        (
            ["--engine", "vllm", "--model", "m", "--bundle", "BUNDLE"],
            "vllm must be installed beside this package",
        ),
        (["--engine", "vllm", "--model", "m", "--bundle", "nowhere"], "must be a bundle"),
        (
            ["--engine", "vllm", "--model", "builtin-real", "--bundle", "BUNDLE"],
            "model and clip must be such as vLLM knows",
        ),
        (["--print"], "--engine vllm must stand with print"),
        (["--no-router"], "--engine vllm must stand with no-router"),
        (
            ["--engine", "vllm", "--model", "m", "--bundle", "BUNDLE", "--no-router", "--bundles", "more"],
            "--bundles must stand without --no-router",
        ),
        (
            ["--engine", "vllm", "--run", "r", "--no-router", "--device", "cpu"],
            "--device must stand without --no-router",
        ),
        (
            ["--engine", "vllm", "--run", "r", "--no-router", "--clip", "c"],
            "--clip must stand without --no-router",
        ),
        (
            ["--engine", "vllm", "--run", "r", "--dtype", "float16", "--", "--dtype", "float32"],
            "--dtype must be given once",
        ),
        (["--", "--seed", "3"], "--engine vllm must stand with flags"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    bundle: Path,
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "installed_version", lambda: None)
    assert main(["serve", *(str(bundle) if word == "BUNDLE" else word for word in words)]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_another_version_and_a_missing_plugin_are_refused(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["serve", "--engine", "vllm", "--model", "m", "--bundle", str(bundle)]
    monkeypatch.setattr(command, "installed_version", lambda: "0.34.0")
    monkeypatch.setattr(command.shutil, "which", lambda name, path: "/somewhere/vllm")
    monkeypatch.setattr(os, "execve", lambda *given: pytest.fail("started"))
    assert main(words) == 2 and "vLLM must be >=0.32,<0.34, got 0.34.0" in capsys.readouterr().err
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert main(words) == 2 and "VLLM_PLUGINS must contain cram" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--print"], ["--", "--revision", "main"]])
def test_another_base_of_the_same_shape_is_refused_before_vllm_starts(
    bundle: Path, more: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "found_program", lambda: "/somewhere/vllm")
    monkeypatch.setattr(os, "execve", lambda *given: pytest.fail("started"))
    words = ["serve", "--engine", "vllm", "--model", str(bundle.with_name("other")), "--bundle", str(bundle)]
    assert main([*words, *more]) == 2
    said = capsys.readouterr()
    assert "model must be the base that" in said.err and "vllm serve" not in said.out


@pytest.mark.parametrize("revision", [["--revision", "x"], ["--seed", "1", "--revision=x"]])
def test_a_revision_of_a_name_is_refused(
    bundle: Path, revision: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "found_program", lambda: "/somewhere/vllm")
    words = ["serve", "--engine", "vllm", "--model", "m", "--bundle", str(bundle), "--", *revision]
    assert main(words) == 2
    assert "model must be a folder where --revision is given" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tensor_parallel", "kubernetes", "ray_serve"])
def test_files_for_more_machines_are_yaml(name: str) -> None:
    assert all(yaml.safe_load_all((ROOT / f"examples/vllm/{name}.yaml").read_text()))


def test_the_kubernetes_file_starts_a_server_and_a_router_for_the_same_adapters(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server, _, router, service = yaml.safe_load_all((ROOT / "examples/vllm/kubernetes.yaml").read_text())
    (vllm,) = server["spec"]["template"]["spec"]["containers"]
    (export,) = router["spec"]["template"]["spec"]["initContainers"]
    (proxy,) = router["spec"]["template"]["spec"]["containers"]
    variables = {variable["name"]: variable["value"] for variable in proxy["env"]}
    assert set(variables) == {middleware.BUNDLE, middleware.EXPORT, middleware.CLIP}
    port = proxy["ports"][0]["containerPort"]
    assert service["spec"]["ports"][0]["targetPort"] == port and str(port) in proxy["command"]
    places = {"/bundle/bundle": str(bundle), "/adapters": str(tmp_path)}
    assert set(places) == {variables[middleware.BUNDLE], variables[middleware.EXPORT]}
    shown = []
    for container in (vllm, export):
        words = [places.get(word, word) for word in [*container["command"][1:], *container["args"]]]
        assert main([*words, *([] if "--print" in words else ["--print"])]) == 0
        shown.append(options(shlex.split(capsys.readouterr().out)))
    assert shown[0]["--lora-modules"] == shown[1]["--lora-modules"] and "--middleware" not in shown[0]
    assert len(exported(bundle, tmp_path)) == len(shown[0]["--lora-modules"])
    assert shown[0]["--port"] == [str(vllm["ports"][0]["containerPort"])] and shown[0]["--host"] == [
        "0.0.0.0"
    ]
