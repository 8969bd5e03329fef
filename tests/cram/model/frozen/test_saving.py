"""What a transformers user saves, copies and casts of an attached model."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments

import cram as package
from cram.attach import attach, detach
from cram.config import CramConfig
from tests.cram import factories
from tests.cram.factories import QUESTIONS, expert_weights, image, prompt, routed_llava

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory")


def with_expert(name: str) -> Any:
    model = factories.MODELS[name]()
    cram = attach(model, CramConfig(method="many"), factories.clip_encoder())
    cram.set_experts(["one"], [expert_weights(cram, 0)], trained=1)
    return model


def assert_base(folder: Path, name: str) -> None:
    """The folder loads as the base, with all its weights and no other."""
    loaded, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    expected = factories.MODELS[name]().state_dict()
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", list(factories.MODELS))
def test_save_pretrained_writes_the_base(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, batch = with_expert(name), factories.inputs(name)
    with model.cram.forced("one"):
        before = model(**batch).logits
    with caplog.at_level(logging.WARNING, "cram"):
        model.save_pretrained(tmp_path / "own")
        model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())
    assert [record.message for record in caplog.records] == [
        "save_pretrained writes the base model alone; cram.save(model, folder) saves the experts"
    ] * 2
    for folder in ("own", "given"):
        assert_base(tmp_path / folder, name)
    with model.cram.forced("one"):
        assert torch.equal(model(**batch).logits, before)


def test_a_detached_model_saves_as_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = with_expert("llava")
    detach(model)
    assert "save_pretrained" not in vars(model)
    with caplog.at_level(logging.WARNING, "cram"):
        model.save_pretrained(tmp_path)
    assert not caplog.records
    assert_base(tmp_path, "llava")


def test_detach_gives_back_what_stood_on_the_model(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = factories.llava(), factories.inputs("llava")
    plain = model.generate
    calls = []

    def generate(**options: Any) -> Any:
        calls.append(options)
        return plain(**options, max_new_tokens=2)

    own = {"generate": generate, "save_pretrained": calls.append, "init_continuous_batching": calls.append}
    vars(model).update(own)
    with caplog.at_level(logging.WARNING, "cram"):
        cram = attach(model, CramConfig(method="many"), factories.clip_encoder())
    assert "own save_pretrained and init_continuous_batching is out of use until" in caplog.messages[-1]
    cram.set_experts(["one"], [expert_weights(cram, 0)], trained=0)
    with cram.forced("one"):
        tokens = model.generate(**batch)
    assert len(calls) == 1 and tokens.shape[1] == batch["input_ids"].shape[1] + 2
    detach(model)
    assert {name: vars(model)[name] for name in own} == own


def test_what_was_set_on_an_attached_model_stays_and_works_after_detach() -> None:
    model, batch = factories.llava(), factories.inputs("llava")
    expected = model.generate(**batch, max_new_tokens=2)
    attach(model, CramConfig(method="many"), factories.clip_encoder())
    inner = model.generate
    model.generate = lambda **options: inner(**options, max_new_tokens=2)
    outer = model.generate
    detach(model)
    assert model.generate is outer and torch.equal(model.generate(**batch), expected)
    assert "save_pretrained" not in vars(model) and "init_continuous_batching" not in vars(model)


def test_a_checkpoint_of_trainer_is_the_base(tmp_path: Path) -> None:
    model = with_expert("llava")
    batch = factories.inputs("llava")
    rows = [{key: value[0] for key, value in batch.items()} | {"labels": batch["input_ids"][0]}] * 2
    settings = TrainingArguments(
        str(tmp_path), max_steps=1, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    with model.cram.forced("one"):
        Trainer(model, settings, train_dataset=rows).train()
    assert_base(tmp_path / "checkpoint-1", "llava")


def test_an_offloaded_model_saves_its_base(tmp_path: Path) -> None:
    model = factories.llava()
    cram = attach(model, CramConfig(method="many"), factories.clip_encoder())
    cram.set_experts(["one"], [expert_weights(cram, 0)], trained=0)
    cpu_offload(model, torch.device("cpu"))
    model.hf_device_map = {"": "cpu"}
    with pytest.warns(UserWarning, match="save a model with offloaded modules"):
        model.save_pretrained(tmp_path)
    assert_base(tmp_path, "llava")


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_cast_leaves_what_was_added_in_float32(cast: torch.dtype, tmp_path: Path) -> None:
    model, _, cram = routed_llava()
    cram.method.warm_up.begin()
    weights = cram.expert_weights(2)
    model.to(cast)
    assert cram.modules and all(module.weight.dtype == cast for module in cram.modules.values())
    for path, module in cram.modules.items():
        assert module.solo is not None and all(p.dtype == torch.float32 for p in module.trainable())
        assert all(torch.equal(*pair) for pair in zip(module.factors([2])[0], weights[path], strict=True))
    cram.method.warm_up.end()
    package.save(model, tmp_path / "bundle")
    fresh, _, _ = routed_llava()
    detach(fresh)
    package.load(fresh, tmp_path / "bundle", encoder=factories.clip_encoder(fresh))
    for path, pair in fresh.cram.expert_weights(2).items():
        assert all(torch.equal(*each) for each in zip(pair, weights[path], strict=True))
    centroids = [each.cram.method.router.centroids() for each in (model, fresh)]
    assert torch.equal(*centroids) and centroids[0].dtype == torch.float32


def test_a_move_moves_what_was_added() -> None:
    model, _, cram = routed_llava(trained=True)
    model.to("meta")
    for module in cram.modules.values():
        assert module.experts is not None and module.experts.a.device.type == "meta"
        assert all(p.device.type == "meta" for p in module.trainable())


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved],
    ids=["copy", "pickle", "save"],
)
def test_a_copy_is_a_model_of_its_own(copied: Any, tmp_path: Path) -> None:
    model, processor, cram = routed_llava()
    batch = processor(text=[prompt(QUESTIONS[0])], images=[image(0)], return_tensors="pt")
    with cram.forced("new"):
        twin = copied(model)
    expected = model(**batch).logits
    assert torch.equal(twin(**batch).logits, expected)
    cram.set_experts([], [], 0)
    assert torch.equal(twin(**batch).logits, expected)
    assert twin.cram is not cram and twin.cram.num_experts == 3
    twin.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == factories.llava().state_dict().keys()


@pytest.mark.parametrize("name", factories.MODELS)
def test_the_base_loads_under_its_own_names(name: str) -> None:
    """Left out, the adapted linears would keep other weights than the rest of the model."""
    model, other, batch = factories.MODELS[name](), factories.MODELS[name](seed=5), factories.inputs(name)
    cram = attach(model, CramConfig(method="many"), factories.clip_encoder())
    cram.set_experts(["one"], [expert_weights(cram, 0)], trained=0)
    experts = cram.expert_weights(0)
    left = model.load_state_dict(other.state_dict(), strict=False)
    assert not left.unexpected_keys and all(".experts." in key for key in left.missing_keys)
    with cram.disabled():
        assert torch.equal(model(**batch).logits, other(**batch).logits)
    assert all(torch.equal(a, experts[path][0]) for path, (a, _) in cram.expert_weights(0).items())
    assert not any(model.load_state_dict(model.state_dict()))
