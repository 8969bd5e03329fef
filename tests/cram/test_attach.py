"""attach and detach on the four families."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from cram.attach import attach, detach
from cram.config import CramConfig
from cram.loading import load_processor
from cram.model.attached import AttachedModel
from cram.model.linear import ExpertLinear
from cram.routing.pictures import through_tiles
from tests.cram import factories, runs

FAMILIES = list(factories.MODELS)


def attached(name: str, **config: Any) -> tuple[Any, AttachedModel]:
    model = factories.MODELS[name]()
    return model, attach(model, CramConfig(buffer_rank=9, **config), factories.clip_encoder())


def with_expert(name: str) -> tuple[Any, AttachedModel]:
    model, cram = attached(name)
    centroid = torch.zeros(factories.PROJECTION)
    cram.method.add_expert("one", factories.expert_weights(cram, 0), 0, centroid, trained=False)
    return model, cram


@pytest.mark.parametrize("name", FAMILIES)
def test_attach_matches_language_model_linears_only(name: str) -> None:
    model, cram = attached(name)
    expected = {
        f"model.language_model.layers.{layer}.self_attn.{p}_proj"
        for layer in range(factories.LAYERS)
        for p in "qkvo"
    }
    assert cram.modules.keys() == expected
    assert {p for p, m in model.named_modules() if isinstance(m, ExpertLinear)} == expected
    assert cram.report.counts == {f"{p}_proj": factories.LAYERS for p in "qkvo"}
    assert [m.layer for m in cram.modules.values()] == [0] * 4 + [1] * 4
    assert all(".mlp." in path for path in cram.report.skipped)
    assert len(cram.report.skipped) == 3 * factories.LAYERS
    assert str(cram.report).startswith(f"{name}: 8 linears in 2 layers (q_proj x 2")
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_attached_without_experts_is_bit_identical(name: str) -> None:
    model, batch = factories.MODELS[name](), factories.inputs(name, rows=2)
    before = model(**batch).logits
    attach(model, CramConfig(), factories.clip_encoder())
    assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("name", FAMILIES)
def test_detach_is_bit_identical(name: str) -> None:
    model, batch = factories.MODELS[name](), factories.inputs(name, rows=2)
    model.lm_head.requires_grad_(False)
    before, modules = model(**batch).logits, dict(model.named_modules())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    flags = {key: p.requires_grad for key, p in model.named_parameters()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]

    cram = attach(model, CramConfig(buffer_rank=9), factories.clip_encoder())
    cram.method.add_expert("one", factories.expert_weights(cram, 0), 0, torch.zeros(factories.PROJECTION))
    with cram.forced("one"):
        changed = model(**batch).logits
    assert not torch.equal(changed, before)
    model.train().eval()
    detach(model)

    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert {key: p.requires_grad for key, p in model.named_parameters()} == flags
    assert dict(model.named_modules()) == modules
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert not hasattr(model, "cram")
    assert torch.equal(model(**batch).logits, before)
    attach(model, CramConfig(), factories.clip_encoder())


@pytest.mark.parametrize("name", FAMILIES)
def test_explicit_route_works_on_every_family(name: str) -> None:
    model, cram = with_expert(name)
    batch = factories.inputs(name, rows=2)
    query = cram.encode(factories.QUESTIONS[:2], [[factories.image(0)], []])
    cram.method.router.groups.observe("task", query.text)
    base = cram_disabled(model, cram, batch)
    with cram.fixed(cram.route(query)):
        routed = model(**batch).logits
        generated = model.generate(**batch, max_new_tokens=3, do_sample=False, num_beams=2)
    assert not torch.allclose(routed, base)
    with cram.forced("one"):
        assert torch.equal(model(**batch).logits, routed)
        assert torch.equal(model.generate(**batch, max_new_tokens=3, do_sample=False, num_beams=2), generated)


def cram_disabled(model: nn.Module, cram: AttachedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with cram.disabled():
        return model(**batch).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_disabled_is_bit_identical_to_the_base(name: str) -> None:
    batch = factories.inputs(name, rows=2)
    expected = factories.MODELS[name]()(**batch).logits
    model, cram = with_expert(name)
    assert torch.equal(cram_disabled(model, cram, batch), expected)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "internvl"])
def test_pixels_without_a_processor_must_be_routed_explicitly(name: str) -> None:
    model, _ = with_expert(name)
    with pytest.raises(ValueError, match="processor must be given to attach.*route explicitly"):
        model(**factories.inputs(name))


def test_target_projections_choose_the_linears() -> None:
    _, cram = attached("llava", target_projections=("down_proj", "q_proj"))
    assert cram.report.counts == {"down_proj": 2, "q_proj": 2}
    assert len(cram.report.skipped) == 5 * factories.LAYERS


@pytest.mark.parametrize("names", [("query",), ("q_proj", "query")])
def test_no_match_is_an_error(names: tuple[str, ...]) -> None:
    model = factories.llava()
    state = list(model.state_dict())
    with pytest.raises(ValueError, match=r"'query': 0\} matches; linears there: \['down_proj', .*'v_proj'\]"):
        attach(model, CramConfig(target_projections=names), factories.clip_encoder())
    assert list(model.state_dict()) == state
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_linear_of_a_foreign_class_is_named(name: str) -> None:
    """Some quantisations put modules in the place of linears that are none."""
    model = factories.MODELS[name]()
    kind = torch.nn.Bilinear
    model.model.language_model.layers[1].self_attn.k_proj = kind(2, 2, 2)
    with pytest.raises(
        ValueError, match=r"layers\.1\.self_attn\.k_proj must be an `nn.Linear` .* got .*Bilinear"
    ):
        attach(model, CramConfig(), factories.clip_encoder())
    assert not any(isinstance(module, ExpertLinear) for module in model.modules())


def test_a_slower_implementation_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = sys.modules["cram.attach"]
    monkeypatch.setattr(module, "native_libraries", lambda: {"cpu": "libcram_cpu.so was not built"})
    module._say_what_is_slow.cache_clear()
    for _ in range(2):
        attached("llava")
    (told,) = [record.getMessage() for record in caplog.records if record.name == "cram.attach"]
    assert "a slower implementation stands in; `cram info` says how to mend it (libcram_cpu.so was" in told
    module._say_what_is_slow.cache_clear()


def test_double_attach_is_an_error() -> None:
    model, cram = attached("llava")
    with pytest.raises(ValueError, match="must not be attached"):
        attach(model, CramConfig(), factories.clip_encoder())
    assert model.cram is cram
    # The methods that transformers would use for a plain model are taken over, until detach.
    assert {"generate", "save_pretrained"} <= vars(model).keys()
    detach(model)
    assert not {"generate", "save_pretrained", "cram"} & vars(model).keys()


def test_an_unknown_method_names_the_known_ones() -> None:
    model = factories.llava()
    with pytest.raises(ValueError, match=r"method must be one of \['branchlora', .*'cram', .*got 'cramp'"):
        attach(model, CramConfig(method="cramp"), factories.clip_encoder())
    assert not hasattr(model, "cram")


def test_an_expert_of_a_known_name_or_beside_one_in_training_is_refused() -> None:
    _, cram = attached("llava")
    weights = factories.expert_weights(cram, 0)
    cram.add_expert("one", weights, trained=True)
    with pytest.raises(ValueError, match="'one' must be frozen before adding one, got 'two'"):
        cram.add_expert("two", weights)
    cram.freeze()
    with pytest.raises(ValueError, match="expert name must be new, got 'one'"):
        cram.add_expert("one", weights)
    with pytest.raises(ValueError, match="modules"):
        cram.add_expert("two", dict(list(weights.items())[1:]))
    assert cram.expert_names == ["one"] and cram.num_experts == 1


def test_a_pool_has_a_name_for_each_expert() -> None:
    _, cram = attached("llava")
    weights = [factories.expert_weights(cram, seed) for seed in (0, 1)]
    cram.set_experts(["one", "two"], weights, trained=1)
    assert cram.expert_names == ["one", "two"] and cram.in_training
    for names, trained in ((["one", "one"], 1), (["one"], 0), (["one", "two"], 3)):
        with pytest.raises(ValueError, match="names must be distinct, one for each of 2 experts"):
            cram.set_experts(names, weights, trained)
    assert cram.expert_names == ["one", "two"]


def test_detach_of_a_plain_model_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"must be attached .cram.attach., got a plain LlavaForConditionalGeneration"
    ):
        detach(factories.llava())


def test_unknown_family_names_the_known_ones() -> None:
    known = re.escape("['internvl', 'llava', 'qwen2_5_vl', 'qwen3_vl'], got 'clip'")
    with pytest.raises(ValueError, match=known):
        attach(factories.clip_model(), CramConfig(), factories.clip_encoder())
    with pytest.raises(ValueError, match="got 'Linear'"):
        attach(nn.Linear(2, 2), CramConfig(), factories.clip_encoder())


def test_a_copy_of_an_attached_model_is_independent() -> None:
    model, processor, cram = factories.routed_llava(trained=True)
    batch = processor(
        text=[factories.prompt(factories.QUESTIONS[0])], images=[factories.image(0)], return_tensors="pt"
    )
    expected = model(**batch).logits
    twin = copy.deepcopy(model)
    for parameter in twin.cram.trainable_parameters():
        parameter.data.mul_(3)
    assert not torch.allclose(twin(**batch).logits, expected)
    assert torch.equal(model(**batch).logits, expected)
    detach(twin)
    assert torch.equal(model(**batch).logits, expected)
    assert cram is model.cram


WRONG = {
    "tuned": (
        lambda: get_peft_model(factories.llava(), LoraConfig(target_modules=["q_proj"])),
        "adapters of PEFT",
    ),
    "injected": (
        lambda: injected(factories.llava()),
        r"got a LlavaForConditionalGeneration with one at .*q_proj",
    ),
    "inner": (lambda: factories.llava().model, "got a LlavaModel, a part of one"),
    "compiled": (lambda: torch.compile(factories.llava()), "pass `model._orig_mod`"),
    "parallel": (lambda: nn.DataParallel(factories.llava()), "pass `model.module`"),
}


def injected(model: Any, config: LoraConfig | None = None) -> Any:
    """A model with adapters by transformers' own loading, which may want a newer PEFT than is installed."""
    try:
        model.add_adapter(config or LoraConfig(target_modules=["q_proj"]))
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(f"transformers {transformers.__version__} does not load adapters: {error}")
    return model


# torch says this of itself when `torch.compile` is first used.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("kind", list(WRONG))
def test_what_is_no_plain_model_is_refused(kind: str) -> None:
    make, message = WRONG[kind]
    model = make()
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        attach(model, CramConfig(), factories.clip_encoder())
    assert list(model.state_dict()) == before


@pytest.mark.parametrize("how", ["get_peft_model", "add_adapter"])
def test_adapters_of_peft_do_not_go_into_an_attached_model(how: str) -> None:
    model, _ = with_expert("llava")
    config = LoraConfig(target_modules="all-linear")
    with pytest.raises(ValueError, match=r"must leave out the linears of an attached model, got .*q_proj"):
        get_peft_model(model, config) if how == "get_peft_model" else injected(model, config)


def test_adapters_of_peft_beside_the_adapted_linears_act() -> None:
    model, cram = with_expert("llava")
    with cram.forced("one"):
        before = model(**factories.inputs("llava")).logits
        tuned = get_peft_model(model, LoraConfig(target_modules=["gate_proj"], init_lora_weights=False))
        assert not torch.allclose(tuned(**factories.inputs("llava")).logits, before)


def test_an_explicit_query_reads_pictures_as_a_processor_of_tiles_leaves_them(tmp_path: Path) -> None:
    processor = load_processor(runs.save_checkpoint("internvl", tmp_path))
    cram = attach(factories.internvl(), CramConfig(), factories.clip_encoder(), processor)
    shown, asked = factories.image(0).resize((48, 16)), factories.QUESTIONS[:1]
    left = through_tiles(shown, processor)
    query, original = cram.encode(asked, [[shown]]), cram.encoder.encode(asked, [[shown]])
    assert torch.equal(query.image, cram.encoder.encode(asked, [[left]]).image)
    assert not torch.equal(query.image, original.image)
