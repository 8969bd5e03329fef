"""Bundles: a round trip, PEFT reads every expert, damage is refused, a kill leaves the previous state."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from cram import attach, detach, load, save
from cram.atomic import new_folder, read_json
from cram.bundle import bundle
from cram.bundle.format import read_description
from cram.config import CramConfig
from tests.cram import factories
from tests.cram.bundle.damage import edit_json, edit_tensors, first_key, poison, resign
from tests.cram.factories import fresh
from tests.cram.kills import every_end


def inputs() -> Any:
    processor = factories.llava_processor()
    prompts = [factories.prompt(question) for question in factories.QUESTIONS[:2]]
    pictures = [factories.image(0), factories.image(1)]
    return processor(text=prompts, images=pictures, padding=True, return_tensors="pt")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, _, _ = factories.routed_llava()
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    save(model, folder)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "bundle"))


@torch.no_grad()
def test_round_trip_is_exact(saved: Path) -> None:
    model, processor, cram = factories.routed_llava()
    expected = model(**inputs()).logits
    other, encoder = fresh()
    loaded = load(other, saved, encoder, processor)
    assert other.cram is loaded
    assert loaded.expert_names == ["old", "other", "new"]
    assert loaded.method.router.groups.locks == cram.method.router.groups.locks
    assert loaded.config == cram.config
    assert torch.equal(other(**inputs()).logits, expected)
    attached_model, attached_encoder = fresh()
    attach(attached_model, cram.config, attached_encoder, processor)
    load(attached_model, saved)
    assert torch.equal(attached_model(**inputs()).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["old", "other", "new"])
def test_peft_reads_an_expert_and_gives_the_same_logits(saved: Path, name: str) -> None:
    model, _, cram = factories.routed_llava()
    with cram.forced(name):
        expected = model(**inputs()).logits
    base, _ = fresh()
    plain = base(**inputs()).logits
    peft = PeftModel.from_pretrained(base, saved / "experts" / name)
    found = peft(**inputs()).logits
    assert (found - plain).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_a_module_of_rank_zero_is_left_out_and_comes_back(tmp_path: Path) -> None:
    model, encoder = fresh()
    cram = attach(model, CramConfig(buffer_rank=9), encoder)
    weights = factories.expert_weights(cram, 0)
    first = next(iter(weights))
    weights[first] = (weights[first][0][:0], weights[first][1][:, :0])
    cram.method.add_expert("one", weights, 0, torch.zeros(factories.PROJECTION), trained=False)
    save(model, tmp_path / "b")
    assert first not in read_json(tmp_path / "b/experts/one/adapter_config.json")["target_modules"]
    detach(model)
    found = load(model, tmp_path / "b", encoder)
    assert [m.experts.ranks for m in found.modules.values()] == [(a.shape[0],) for a, _ in weights.values()]


def test_a_bundle_without_experts_is_legal(tmp_path: Path) -> None:
    model, encoder = fresh()
    attach(model, CramConfig(buffer_rank=9), encoder)
    save(model, tmp_path / "b")
    detach(model)
    assert load(model, tmp_path / "b", encoder).num_experts == 0


def flip_byte(folder: Path) -> None:
    file = folder / "experts/new/adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def truncate(folder: Path) -> None:
    file = folder / "experts/new/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    resign(folder)


def link_out(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    shutil.move(folder / "method.safetensors", outside)
    (folder / "method.safetensors").symlink_to(outside)


def link_folder(folder: Path) -> None:
    shutil.move(folder / "experts", folder.parent / "experts")
    (folder / "experts").symlink_to(folder.parent / "experts")


def rename_keys(tensors: dict[str, torch.Tensor]) -> None:
    for key in list(tensors):
        tensors[key.replace("base_model.model.", "")] = tensors.pop(key)


def narrow(tensors: dict[str, torch.Tensor]) -> None:
    tensors[first_key(tensors)] = tensors[first_key(tensors)][:, :-1].contiguous()


WEIGHTS = "experts/new/adapter_model.safetensors"
ADAPTER = "experts/new/adapter_config.json"
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped byte": (flip_byte, "got an altered file"),
    "truncated file": (truncate, "bytes by its header"),
    "missing manifest": (lambda f: (f / "manifest.json").unlink(), "must be a bundle with a manifest.json"),
    "missing file": (lambda f: (f / "cram.json").unlink(), "the bundle is incomplete"),
    "not JSON": (lambda f: (f / "manifest.json").write_text("{"), "must be a JSON file"),
    "newer format": (
        edit_json("manifest.json", lambda d: d.update(format=99)),
        r"must be one of \(1, 2, 3, 4\), got 99",
    ),
    "unknown key": (edit_json("cram.json", lambda d: d.update(code="x")), "must have the keys"),
    "unknown config": (edit_json("cram.json", lambda d: d["config"].update(x=1)), "config keys must be"),
    "wrong type": (edit_json("cram.json", lambda d: d.update(num_layers="2")), "num_layers must be a int"),
    "escaping name": (
        edit_json("cram.json", lambda d: d["experts"][0].update(name="../x")),
        "expert name must match",
    ),
    "escaping path": (
        edit_json("manifest.json", lambda d: d["files"].update({"experts/../x": {}})),
        "must list files of a bundle only",
    ),
    "unlisted expert": (
        edit_json("cram.json", lambda d: d["experts"].pop()),
        "must list exactly the files of the experts",
    ),
    "wrong rank": (
        edit_json("cram.json", lambda d: d["experts"][2]["ranks"].update(dict.fromkeys(d["modules"], 1))),
        "must agree with cram.json",
    ),
    "other modules": (
        edit_json(
            "cram.json",
            lambda d: (
                d["modules"].pop(list(d["modules"])[0]),
                [e["ranks"].pop(list(e["ranks"])[0]) for e in d["experts"]],
            ),
        ),
        "only in the model",
    ),
    "other family": (edit_json("cram.json", lambda d: d.update(family="qwen3_vl")), "must be of family"),
    "lock out of range": (
        edit_json("cram.json", lambda d: d["method"]["values"]["locks"].update(task0=7)),
        "locks must name groups",
    ),
    "other scale": (edit_json(ADAPTER, lambda d: d.update(lora_alpha=64)), "must agree with cram.json"),
    "keys of another model": (edit_tensors(WEIGHTS, rename_keys), "0 of 16 match"),
    "partial match": (edit_tensors(WEIGHTS, lambda t: t.pop(first_key(t))), "15 of 16 match"),
    "wrong shape": (edit_tensors(WEIGHTS, narrow), "must have shape"),
    "half precision": (
        edit_tensors(WEIGHTS, lambda t: t.update({k: v.half() for k, v in t.items()})),
        "must hold F32",
    ),
    "NaN expert": (edit_tensors(WEIGHTS, poison(float("nan"))), "must be finite"),
    "infinite centroid": (edit_tensors("method.safetensors", poison(float("inf"))), "must be finite"),
    "link out of the folder": (link_out, "must not be a link"),
    "linked folder": (link_folder, "must not be a link"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_bundle_is_refused_and_the_model_stays_plain(copied: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    damage(copied)
    model, encoder = fresh()
    with pytest.raises(ValueError, match=message):
        load(model, copied, encoder)
    assert not hasattr(model, "cram")


def test_names_that_do_not_match_are_listed_from_both_sides(copied: Path) -> None:
    edit_tensors(WEIGHTS, rename_keys)(copied)
    model, encoder = fresh()
    with pytest.raises(ValueError, match=r"missing \[base_model\.model.* unexpected \[model\.language"):
        load(model, copied, encoder)


def test_another_base_is_refused_before_anything_is_read(saved: Path) -> None:
    model = factories.MODELS["qwen3_vl"]()
    with pytest.raises(ValueError, match="family 'llava'"):
        load(model, saved, factories.clip_encoder())


def test_a_model_with_experts_or_another_configuration_is_refused(saved: Path) -> None:
    model, _, _ = factories.routed_llava()
    with pytest.raises(ValueError, match="must have no experts"):
        load(model, saved)
    other, encoder = fresh()
    attach(other, CramConfig(), encoder)
    with pytest.raises(ValueError, match="with the bundle's configuration"):
        load(other, saved)


def test_save_refuses_what_is_not_a_bundle(tmp_path: Path) -> None:
    model, _, _ = factories.routed_llava()
    (tmp_path / "notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="must be new, empty or a bundle"):
        save(model, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "keep"
    plain, _ = fresh()
    with pytest.raises(ValueError, match="must be attached"):
        save(plain, tmp_path / "b")


def test_an_expert_that_nothing_leads_to_is_not_saved(tmp_path: Path) -> None:
    model, _, cram = factories.routed_llava()
    cram.add_expert("lost", factories.expert_weights(cram, 5), trained=False)
    with pytest.raises(
        ValueError, match=r"a group and a centroid, got .*'lost'\] of which .*method\.add_expert"
    ):
        save(model, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_kill_at_any_write_point_leaves_the_old_bundle_or_the_new_one(tmp_path: Path) -> None:
    model, _, cram = factories.routed_llava()
    folder = tmp_path / "here" / "bundle"
    save(model, folder)
    old = read_json(folder / "manifest.json")
    before = shutil.copytree(folder, tmp_path / "before")
    cram.method.add_expert(
        "late", factories.expert_weights(cram, 5), 0, torch.zeros(factories.PROJECTION), False
    )

    def restore() -> None:
        shutil.rmtree(folder.parent)
        shutil.copytree(before, folder)

    late = set()
    for end in every_end(lambda: save(model, folder), restore, step=2):
        description = read_description(folder)
        names = [expert.name for expert in description.experts]
        assert names in (["old", "other", "new"], ["old", "other", "new", "late"]), end
        assert len(names) == 4 or read_json(folder / "manifest.json") == old
        late.add(len(names) == 4)
    assert late == {False, True}
    save(model, folder)
    assert len(read_description(folder).experts) == 4
    assert [path.name for path in folder.parent.iterdir()] == ["bundle"]


def test_a_block_that_raises_leaves_the_folder_alone(tmp_path: Path) -> None:
    with new_folder(tmp_path / "f") as partial:
        (partial / "a").write_text("1")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "f") as partial:
        (partial / "a").write_text("2")
        raise RuntimeError
    assert (tmp_path / "f/a").read_text() == "1"


@pytest.mark.parametrize("step", ["check_experts", "check_hashes", "read_packs"])
def test_a_bundle_that_changes_while_it_is_read_is_refused(
    copied: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Every file of the other bundle is whole and of the same size."""
    model, _, cram = factories.routed_llava()
    for path in cram.modules:
        cram.modules[path].experts.a.mul_(2)
    real = getattr(bundle, step)

    def replaced(*given: Any) -> Any:
        found = real(*given)
        save(model, copied)
        return found

    monkeypatch.setattr(bundle, step, replaced)
    other, encoder = fresh()
    with pytest.raises(ValueError, match="must stay as it is while the bundle is read|must match its entry"):
        load(other, copied, encoder, factories.llava_processor())
    assert not hasattr(other, "cram")


def test_pipes_and_devices_among_the_files_are_never_opened(copied: Path) -> None:
    for name in ("notes", "experts/old/notes"):
        os.mkfifo(copied / name)
    model, encoder = fresh()
    load(model, copied, encoder, factories.llava_processor())
    for name in ("cram.json", "method.safetensors", "experts/old/adapter_config.json", "manifest.json"):
        kept = (copied / name).read_bytes()
        (copied / name).unlink()
        os.mkfifo(copied / name)
        with pytest.raises(ValueError, match="must be a file, got none|must be a bundle with"):
            load(fresh()[0], copied, encoder, factories.llava_processor())
        (copied / name).unlink()
        (copied / name).write_bytes(kept)
