"""Bundles that the versions of formats 2 and 3 wrote: they load, answer the same and become format 4."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cram import CramConfig, attach, load, save
from cram.atomic import read_json, write_json
from cram.bundle.format import FORMAT_VERSION, METHOD, ROUTER, SHARED_A
from tests.cram import factories
from tests.cram.bundle.damage import edit_json, edit_tensors, resign

FOLDER = Path(__file__).parent / "format2"
METHODS = ("cram", "branchlora", "many", "moelora")


@pytest.fixture(params=METHODS)
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of one method's bundle."""
    return Path(shutil.copytree(FOLDER / request.param, tmp_path / request.param))


def answers(model: Any) -> dict[str, Tensor]:
    """Greedy tokens and the prompts' last logits for two questions with a picture each."""
    prompts = [factories.prompt(question) for question in factories.QUESTIONS[:2]]
    pictures = [factories.image(0), factories.image(1)]
    processor = factories.llava_processor()
    batch = processor(text=prompts, images=pictures, padding=True, return_tensors="pt")
    with torch.no_grad():
        tokens = model.generate(**batch, max_new_tokens=8, do_sample=False)
        return {"tokens": tokens[:, batch["input_ids"].shape[1] :], "logits": model(**batch).logits[:, -1]}


def loaded(folder: Path) -> Any:
    """A base with a bundle's experts."""
    model, encoder = factories.fresh()
    load(model, folder, encoder, factories.llava_processor())
    return model


def test_a_bundle_of_format_2_answers_as_before_and_is_written_as_format_4(
    bundle: Path, tmp_path: Path
) -> None:
    assert read_json(bundle / "manifest.json")["format"] == 2
    expected = load_file(FOLDER / f"{bundle.name}.safetensors")
    model = loaded(bundle)
    found = answers(model)
    assert torch.equal(found["tokens"], expected["tokens"])
    torch.testing.assert_close(found["logits"], expected["logits"], atol=1e-4, rtol=1e-4)
    save(model, tmp_path / "again")
    assert read_json(tmp_path / "again" / "manifest.json")["format"] == FORMAT_VERSION == 4
    again = answers(loaded(tmp_path / "again"))
    assert all(torch.equal(again[name], found[name]) for name in found)


def test_groups_may_be_as_many_as_the_configuration_allows_and_no_more(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FOLDER / "cram", tmp_path / "cram"))
    edit_json("cram.json", lambda data: data["config"].update(max_groups=2))(folder)
    assert len(loaded(folder).cram.method.router.groups) == 2
    edit_json("cram.json", lambda data: data["config"].update(max_groups=1))(folder)
    with pytest.raises(ValueError, match="counts must be up to 1 of at least 1"):
        loaded(folder)


def test_format_4_holds_what_the_method_has_and_nothing_else(bundle: Path, tmp_path: Path) -> None:
    model = loaded(bundle)
    save(model, tmp_path / "again")
    method = bundle.name
    kept = load_file(tmp_path / "again" / METHOD)
    assert kept.keys() == model.cram.method.export_state().tensors.keys()
    assert ({"centroids", "prototypes"} <= kept.keys()) == (method == "cram")
    assert not (tmp_path / "again" / ROUTER).exists()
    assert (tmp_path / "again" / SHARED_A).exists() == (method == "branchlora")
    if method == "branchlora":
        shared = load_file(tmp_path / "again" / SHARED_A)
        folders = sorted((tmp_path / "again" / "experts").iterdir())
        alone = [load_file(folder / "adapter_model.safetensors") for folder in folders]
        assert all("lora_A" in name for name in shared) and len(shared) == len(model.cram.modules)
        assert all("lora_B" in name for tensors in alone for name in tensors)
        assert model.cram.shares_a and loaded(tmp_path / "again").cram.shares_a


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("cram.json", lambda d: d.pop("groups"), "must have the keys"),
        ("cram.json", lambda d: d["groups"]["counts"].append(0), "counts must be up to 5"),
        (
            "cram.json",
            lambda d: d["groups"].update(locks={"colour": len(d["groups"]["counts"])}),
            "locks must name groups below",
        ),
        ("cram.json", lambda d: d["experts"][0].update(group=-1), r"experts must be \[name, group below"),
        (ROUTER, lambda t: t.pop("centroids"), "missing"),
    ],
)
def test_a_damaged_bundle_of_format_2_is_refused(
    name: str, change: Any, message: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(FOLDER / "cram", tmp_path / "bundle"))
    (edit_json if name.endswith(".json") else edit_tensors)(name, change)(folder)
    model, encoder = factories.fresh()
    with pytest.raises(ValueError, match=message):
        load(model, folder, encoder, factories.llava_processor())
    assert not hasattr(model, "cram")


@pytest.fixture
def third(tmp_path: Path) -> Path:
    """A copy of the bundle of format 3, which has values of two weights of its base."""
    return Path(shutil.copytree(Path(__file__).parent / "format3" / "cram", tmp_path / "third"))


def test_a_bundle_of_format_3_answers_as_before(third: Path) -> None:
    expected = load_file(FOLDER / "cram.safetensors")
    found = answers(loaded(third))
    assert torch.equal(found["tokens"], expected["tokens"])
    torch.testing.assert_close(found["logits"], expected["logits"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("layer", "projection"), [(0, "q_proj"), (-1, "o_proj")])
def test_a_bundle_of_format_3_knows_two_weights_of_its_base(third: Path, layer: int, projection: str) -> None:
    model, encoder = factories.fresh()
    with torch.no_grad():
        model.model.language_model.layers[layer].self_attn.get_submodule(projection).weight.mul_(1.05)
    with pytest.raises(ValueError, match="other weights in its first or last adapted linear"):
        load(model, third, encoder, factories.llava_processor())
    edit_json("cram.json", lambda data: data.pop("base_values"))(third)
    assert load(model, third, encoder, factories.llava_processor()).num_experts == 3


@pytest.mark.parametrize("values", [[], [0.0] * 3, ["1"] * 256, [1] * 256, {}])
def test_values_of_another_kind_in_format_3_are_refused(third: Path, values: Any) -> None:
    edit_json("cram.json", lambda data: data.update(base_values=values))(third)
    with pytest.raises(ValueError, match="base"):
        loaded(third)


def as_format_1(folder: Path) -> None:
    """The folder as it was written before methods kept anything."""
    data = read_json(folder / "cram.json")
    assert data.pop("method") == {} and data["config"].pop("method") == "cram"
    write_json(folder / "cram.json", {**data, "format": 1})
    resign(folder)
    write_json(folder / "manifest.json", {**read_json(folder / "manifest.json"), "format": 1})


def test_format_1_is_read(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FOLDER / "cram", tmp_path / "bundle"))
    config = loaded(folder).cram.config
    as_format_1(folder)
    model = loaded(folder)
    assert model.cram.method.name == "cram"
    assert torch.equal(answers(model)["tokens"], load_file(FOLDER / "cram.safetensors")["tokens"])
    other, encoder = factories.fresh()
    attach(other, CramConfig.from_dict({**config.to_dict(), "method": "olora"}), encoder)
    assert load(other, folder).method.name == "olora"
