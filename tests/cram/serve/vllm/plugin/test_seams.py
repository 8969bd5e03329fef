"""The plugin's checks without vLLM: its version window, its entry point, and requests of other makers."""

from __future__ import annotations

import inspect
import tomllib
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cram.serve.vllm.group import KEY, GateGroup, encode
from cram.serve.vllm.plugin import frontend, seams

ROOT = Path(__file__).resolve().parents[5]


@pytest.mark.parametrize("version", ["0.32.0", "0.33.2+cu130", "0.32.0rc1"])
def test_versions_of_the_window_are_taken(version: str) -> None:
    seams.check_version(version)


@pytest.mark.parametrize("version", [None, "0.31.9", "0.34.0", "1.0", "dev"])
def test_other_versions_are_refused(version: str | None) -> None:
    with pytest.raises(ValueError, match=r"vLLM must be >=0.32,<0.34, got"):
        seams.check_version(version)


def test_the_entry_point_is_there() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    module, _, name = declared["vllm.general_plugins"]["cram"].partition(":")
    assert callable(getattr(import_module(module), name))


GROUP = GateGroup(1, ("a", "b"), (2, 1), 2, ("m",), "content", {"bytes": 1, "sha256": ""})
GATES = np.ones((2, 2), np.float32) / 4


@pytest.fixture(autouse=True)
def _groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """One folder holds a group, the others hold plain adapters."""
    monkeypatch.setattr(frontend, "group_at", lambda path: GROUP if path == "group" else None)


def request(path: str | None, value: Any, salt: str | None = None) -> Any:
    """A request of vLLM's."""
    lora = None if path is None else SimpleNamespace(lora_path=path)
    extra = None if value is None else {KEY: value}
    return SimpleNamespace(
        lora_request=lora, sampling_params=SimpleNamespace(extra_args=extra), cache_salt=salt
    )


def test_requests_of_the_front_end_pass_the_core() -> None:
    for salt in (GROUP.salt(GATES), f"{GROUP.salt(GATES)}the client's"):
        frontend.check_core(request("group", encode(GATES), salt))
    frontend.check_core(request("plain", None))
    frontend.check_core(request(None, None, "the client's"))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (request("group", None), "'cram_gates' must be base64 of 2 x 2 float32 .*got none"),
        (request("group", encode(GATES)), "must come through the front end"),
        (request("group", encode(GATES), GROUP.salt(GATES * 2)), "must come through the front end"),
        (request("plain", encode(GATES)), "must come with the adapter of a group"),
        (request(None, encode(GATES)), "must come with the adapter of a group"),
    ],
)
def test_other_requests_are_refused_by_the_core(made: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frontend.check_core(made)


def test_a_wrapped_function_keeps_name_and_signature_and_calls_the_original() -> None:
    class Owner:
        def double(self, x: int) -> int:
            """Twice x."""
            return 2 * x

        @classmethod
        def kind(cls, x: int) -> str:
            """The class's name and x."""
            return f"{cls.__name__} {x}"

    @seams.wrap(Owner, "double")
    def more(original: Any) -> Any:
        return lambda self, *args: original(self, *args) + 1

    @seams.wrap(Owner, "kind")
    def longer(original: Any) -> Any:
        return lambda cls, *args: original(cls, *args) + "!"

    assert Owner().double(3) == 7 and Owner.double.__doc__ == "Twice x."
    assert Owner.kind(2) == "Owner 2!"
    assert list(inspect.signature(Owner.double).parameters) == ["self", "x"]
    assert list(inspect.signature(Owner.kind).parameters) == ["x"]
