"""What a bundle holds of a method: described, checked as carefully as the rest, and absent in format 1."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cram import attach, load, save
from cram.atomic import read_json, write_json
from cram.config import CramConfig
from cram.methods.base import MethodState
from cram.methods.moelora import EXPERTS
from tests.cram.bundle.damage import edit_json, edit_tensors, poison, resign
from tests.cram.factories import fresh

STATE = "method.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, encoder = fresh()
    cram = attach(model, CramConfig(method="moelora", rank_max=2, buffer_rank=9, rank_min=1), encoder)
    torch.manual_seed(2)
    cram.method.begin_task("task", 5)
    cram.method.end_task()
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    save(model, folder)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "bundle"))


def first(values: Any) -> str:
    return str(next(iter(values)))


def drop(folder: Path) -> None:
    (folder / STATE).unlink()
    edit_json("manifest.json", lambda d: d["files"].pop(STATE))(folder)


def rename(folder: Path) -> None:
    """A folder that agrees with itself and has another tensor than the method."""
    tensors = load_file(folder / STATE)
    tensors["elsewhere.weight"] = tensors.pop(sorted(tensors)[0])
    consistent(folder, tensors)


def widen(folder: Path) -> None:
    tensors = load_file(folder / STATE)
    name = sorted(tensors)[0]
    tensors[name] = torch.zeros(9, tensors[name].shape[1])
    consistent(folder, tensors)


def consistent(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / STATE)
    data = read_json(folder / "cram.json")
    data["method"]["tensors"] = {name: list(tensor.shape) for name, tensor in tensors.items()}
    write_json(folder / "cram.json", data)
    resign(folder)


def link(folder: Path) -> None:
    shutil.move(folder / STATE, folder.parent / STATE)
    (folder / STATE).symlink_to(folder.parent / STATE)


def shape_of_first(shape: Any) -> Callable[[Path], None]:
    return edit_json(
        "cram.json", lambda d: d["method"]["tensors"].update({first(d["method"]["tensors"]): shape})
    )


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "absent": (drop, "must list exactly the files"),
    "a tensor less": (edit_tensors(STATE, lambda t: t.pop(first(t))), "7 of 8 match"),
    "another shape": (shape_of_first([4, 4]), "must have shape"),
    "no shape": (shape_of_first("big"), "must give names their shapes"),
    "negative": (shape_of_first([-1, 4]), "must give names their shapes"),
    "too many dimensions": (shape_of_first([1] * 9), "must give names their shapes"),
    "long name": (
        edit_json("cram.json", lambda d: d["method"]["tensors"].update({"x" * 501: [1]})),
        "must give names their shapes",
    ),
    "a name as long as one may be": (
        edit_json("cram.json", lambda d: d["method"]["tensors"].update({"x" * 500: [1]})),
        "8 of 9 match",
    ),
    "NaN": (edit_tensors(STATE, poison(float("nan"))), "must be finite"),
    "half precision": (
        edit_tensors(STATE, lambda t: t.update({k: v.half() for k, v in t.items()})),
        "must hold F32",
    ),
    "another method's names": (rename, r"method state must have 8 tensors.*\['elsewhere.weight'\]"),
    "another method's shapes": (widen, r"method state .* must have shape \[8, 32\], got \[9, 32\]"),
    "unknown method": (
        edit_json("cram.json", lambda d: d["config"].update(method="x")),
        "method must be one of",
    ),
    "formats that disagree": (edit_json("manifest.json", lambda d: d.update(format=1)), "must have the keys"),
    "older description": (
        edit_json("cram.json", lambda d: d.update(format=2)),
        r"format of cram\.json must be 4 as in manifest\.json, got 2",
    ),
    "link": (link, "must not be a link"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_state_is_refused_and_the_model_stays_plain(copied: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    damage(copied)
    model, encoder = fresh()
    before = {path: type(module) for path, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        load(model, copied, encoder)
    assert not hasattr(model, "cram")
    assert {path: type(module) for path, module in model.named_modules()} == before


def test_an_attached_model_is_empty_again_after_a_refusal(copied: Path, saved: Path) -> None:
    rename(copied)
    model, encoder = fresh()
    cram = attach(model, CramConfig(method="moelora", rank_max=2, buffer_rank=9, rank_min=1), encoder)
    with pytest.raises(ValueError, match="method state must have 8 tensors"):
        load(model, copied)
    assert cram.num_experts == 0
    assert load(model, saved) is cram
    assert cram.expert_names == list(EXPERTS)


def test_a_refusal_names_the_fault_also_where_experts_were_taken_out(tmp_path: Path) -> None:
    """A server takes the old experts out before it loads the new ones, and puts them back."""
    model, encoder = fresh()
    cram = attach(model, CramConfig(method="disco"), encoder)
    cram.method.begin_task("one", 5)
    cram.method.end_task()
    whole = cram.method.export_state()
    cram.method.export_state = lambda: MethodState({"text": torch.ones(1)}, {})  # type: ignore[method-assign]
    save(model, tmp_path / "b")
    cram.method.export_state = lambda: whole  # type: ignore[method-assign]
    cram.set_experts((), (), 0)
    with pytest.raises(ValueError, match=r"missing \['text_anchors'\], unexpected \['text'\]"):
        load(model, tmp_path / "b")


def test_states_that_cannot_be_stored_are_refused(tmp_path: Path) -> None:
    model, encoder = fresh()
    cram = attach(model, CramConfig(method="moelora", buffer_rank=9), encoder)
    whole = MethodState({"count": torch.zeros(1, dtype=torch.int64)}, {})
    cram.method.export_state = lambda: whole  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"count must be float32, got torch\.int64"):
        save(model, tmp_path / "b")
    bad = MethodState({"mean": torch.full((1,), torch.nan)}, {})
    cram.method.export_state = lambda: bad  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="mean must be finite"):
        save(model, tmp_path / "b")
    assert not (tmp_path / "b").exists()
