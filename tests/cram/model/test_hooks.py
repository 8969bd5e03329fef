"""Automatic and explicit routing of a forward: every sample is routed by itself, and nothing is a silent
no-op."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from cram.attach import attach
from cram.config import CramConfig
from cram.model.attached import AttachedModel
from cram.model.cache import made_cache
from cram.routing.clip import ClipEncoder
from cram.routing.pictures import Pixels
from cram.routing.prompts import Call, Images
from cram.routing.query import Query
from tests.cram import factories
from tests.cram.factories import QUESTIONS, image, prompt, routed_llava
from tests.cram.model.versions import AHEAD

SAMPLES: list[tuple[str, list[Any]]] = [
    (QUESTIONS[0], [image(0)]),
    (QUESTIONS[1], [image(1)]),
    (QUESTIONS[0], []),
    (QUESTIONS[2], [image(2), image(0)]),
    (QUESTIONS[1], [image(3), image(4), image(2)]),
]


def batch_of(processor: Any, samples: list[tuple[str, list[Any]]], side: str = "left") -> Any:
    processor.tokenizer.padding_side = side
    images = [picture for _, pictures in samples for picture in pictures]
    texts = [prompt(question, len(pictures)) for question, pictures in samples]
    return processor(text=texts, images=images or None, padding=True, return_tensors="pt")


def own_logits(model: Any, batch: Any) -> list[Tensor]:
    """Logits of each row without its padding."""
    logits = model(**batch).logits
    return [row[mask.bool()] for row, mask in zip(logits, batch["attention_mask"], strict=True)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_equals_its_samples_alone(side: str) -> None:
    model, processor, cram = routed_llava()
    together = own_logits(model, batch_of(processor, SAMPLES, side))
    groups, gates = cram.state.route.groups, cram.state.route.gates
    assert set(groups.tolist()) == {0, 1}
    for index, sample in enumerate(SAMPLES):
        alone = own_logits(model, batch_of(processor, [sample], side))[0]
        torch.testing.assert_close(together[index], alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(gates[:, index], cram.state.route.gates[:, 0], atol=1e-5, rtol=1e-5)
        with cram.disabled():
            base = own_logits(model, batch_of(processor, [sample], side))[0]
        assert (base - alone).abs().max() > 1e-2


def test_gates_follow_group_and_image() -> None:
    model, processor, cram = routed_llava()
    model(**batch_of(processor, SAMPLES[:3]))
    gates = cram.state.route.gates[0]
    assert gates[0, 1] == 0 and 0.5 < gates[0, 0] < 1
    assert gates[1].tolist() == [0, 1, 0]
    assert gates[2].tolist() == [1, 0, 0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_automatic_query_equals_the_explicit_one(side: str) -> None:
    model, processor, cram = routed_llava()
    queries: list[Query] = []
    cram.hooks.on_query.append(queries.append)
    automatic = model(**batch_of(processor, SAMPLES, side)).logits
    explicit = cram.encode([question for question, _ in SAMPLES], [pictures for _, pictures in SAMPLES])
    assert cram.state.query is queries[0] and len(queries) == 1
    torch.testing.assert_close(queries[0].text, explicit.text, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(queries[0].image, explicit.image, atol=1e-5, rtol=1e-5)
    assert torch.equal(queries[0].has_image, explicit.has_image)
    with cram.fixed(cram.route(explicit)):
        fixed = model(**batch_of(processor, SAMPLES, side)).logits
    torch.testing.assert_close(fixed, automatic, atol=1e-5, rtol=1e-5)
    assert len(queries) == 1


def test_answer_of_a_training_prompt_does_not_reach_the_query() -> None:
    model, processor, cram = routed_llava()
    for answer in ("", "a red one"):
        batch = processor(text=[prompt(QUESTIONS[0], answer=answer)], images=[image(0)], return_tensors="pt")
        model(**batch)
        assert torch.equal(cram.state.query.text, cram.encoder.encode_text([QUESTIONS[0]]))


def test_a_prompt_without_turns_is_taken_whole() -> None:
    model, processor, cram = routed_llava()
    model(**processor(text=["<image>\nJust words"], images=[image(0)], return_tensors="pt"))
    assert torch.equal(cram.state.query.text, cram.encoder.encode_text(["Just words"]))


def test_training_uses_the_locked_group_and_inference_does_not() -> None:
    model, processor, cram = routed_llava()
    batch = batch_of(processor, SAMPLES[:2])
    with cram.method.training_group(1):
        model.train()(**batch)
        assert cram.state.route.groups.tolist() == [1, 1]
        model.eval()(**batch)
        assert cram.state.route.groups.tolist() == [0, 1]
        with cram.method.training_group(0):
            model.train()(**batch)
            assert cram.state.route.groups.tolist() == [0, 0]
        model(**batch)
        assert cram.state.route.groups.tolist() == [1, 1]
    assert cram.method.locked_group is None


def test_observers_see_queries_before_the_first_expert() -> None:
    clip = factories.clip_model()
    model, processor = factories.llava(clip=clip), factories.llava_processor()
    cram = attach(model, CramConfig(), factories.clip_encoder(model, clip), processor)
    queries: list[Query] = []
    cram.hooks.on_query.append(queries.append)
    model(**batch_of(processor, SAMPLES))
    assert len(queries[0]) == len(SAMPLES)
    cram.method.warm_up.begin()
    model(**batch_of(processor, SAMPLES))
    assert len(queries) == 2 and cram.state.route is None


def test_every_layer_has_gates_of_its_own() -> None:
    model, processor, cram = routed_llava()
    batch = batch_of(processor, SAMPLES)
    gates = torch.tensor([[0.5, 0.0, 2.0], [0.0, -1.0, 0.25]])
    with torch.no_grad(), cram.fixed(gates[:, None]):
        found = model(**batch).logits
    experts = [cram.expert_weights(index) for index in range(3)]
    with torch.no_grad(), cram.disabled():
        for path, module in cram.modules.items():
            for gate, expert in zip(gates[module.layer], experts, strict=True):
                a, b = expert[path]
                module.base.weight += gate * cram.config.scale * b @ a
        torch.testing.assert_close(found, model(**batch).logits)


def test_a_forward_behind_a_cache_decodes_also_without_experts() -> None:
    model, encoder = factories.fresh()
    cram = attach(model, CramConfig(), encoder, factories.llava_processor())
    batch = batch_of(factories.llava_processor(), SAMPLES[:1])
    cache = made_cache(model(**batch, use_cache=True))
    assert not cram.state.decoding
    model(input_ids=torch.tensor([[40]]), **factories.continuing(model, cache))
    assert cram.state.decoding and cram.state.route is None


def test_forced_expert_acts_alone() -> None:
    model, processor, cram = routed_llava()
    batch = batch_of(processor, SAMPLES)
    with cram.forced("other") as route:
        by_name = model(**batch).logits
        assert route.groups is None
    with cram.forced(1):
        assert torch.equal(model(**batch).logits, by_name)
    one_hot = torch.tensor([0.0, 1.0, 0.0])
    for gates in (one_hot, one_hot.expand(len(SAMPLES), 3), one_hot.expand(2, len(SAMPLES), 3)):
        with cram.fixed(gates):
            torch.testing.assert_close(model(**batch).logits, by_name)


def test_contexts_nest_and_end() -> None:
    model, processor, cram = routed_llava()
    batch = batch_of(processor, SAMPLES[:1])
    automatic = model(**batch).logits
    with cram.forced(1):
        forced = model(**batch).logits
        with cram.disabled():
            base = model(**batch).logits
        assert torch.equal(model(**batch).logits, forced)
    with pytest.raises(KeyError), cram.disabled():
        raise KeyError
    assert torch.equal(model(**batch).logits, automatic)
    assert not torch.allclose(base, forced) and not torch.allclose(forced, automatic)


def test_no_expert_selected_is_the_base_model() -> None:
    model, processor, cram = routed_llava()
    batch = batch_of(processor, SAMPLES)
    with cram.disabled():
        base = model(**batch).logits
    with cram.fixed(torch.zeros(3)):
        assert torch.equal(model(**batch).logits, base)


@pytest.mark.parametrize("expert", ["nobody", 3, -1, 1.0, None])
def test_forcing_an_unknown_expert_is_an_error(expert: Any) -> None:
    _, _, cram = routed_llava()
    with pytest.raises(ValueError, match=r"\['old', 'other', 'new'\]"), cram.forced(expert):
        pass


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        (torch.zeros(2), r"gates must be \[2, S, 3\], got \[2, 1, 2\]"),
        (torch.zeros(3, 2, 3), r"gates must be \[2, S, 3\], got \[3, 2, 3\]"),
        (torch.zeros(1, 1, 1, 3), r"gates must be \[E\], \[S, E\] or \[L, S, E\]"),
        (torch.zeros(0, 3), "multiple of the 0 routed samples"),
        (torch.full((3,), torch.nan), "gates must be finite"),
    ],
)
def test_wrong_gates_are_refused(gates: Tensor, message: str) -> None:
    _, _, cram = routed_llava()
    with pytest.raises(ValueError, match=message), cram.fixed(gates):
        pass


def test_rows_that_do_not_fit_the_route_are_refused() -> None:
    model, processor, cram = routed_llava()
    with (
        cram.fixed(torch.ones(2, 3)),
        pytest.raises(ValueError, match="multiple of the 2 routed samples, got 3"),
    ):
        model(**batch_of(processor, SAMPLES[:3]))


def test_a_route_from_before_an_expert_was_added_is_refused() -> None:
    model, processor, cram = routed_llava()
    with cram.fixed(torch.ones(3)):
        cram.method.add_expert(
            "late", factories.expert_weights(cram, 5), 0, torch.zeros(factories.PROJECTION)
        )
        with pytest.raises(ValueError, match=r"gates must be \[2, S, 4\], got \[2, 1, 3\]"):
            model(**batch_of(processor, SAMPLES[:1]))


def test_inputs_that_cannot_be_routed_are_an_error() -> None:
    model, processor, cram = routed_llava()
    batch = batch_of(processor, SAMPLES[2:3])
    embeds = model.get_input_embeddings()(batch["input_ids"])
    for call in (
        lambda: model(inputs_embeds=embeds),
        lambda: model.model.language_model(inputs_embeds=embeds),
        lambda: model.model.language_model(input_ids=batch["input_ids"]),
    ):
        with pytest.raises(
            ValueError, match="must see input_ids of the model's own forward.*route explicitly"
        ):
            call()
    with cram.forced(0):
        expected = model(**batch).logits
        assert torch.equal(
            model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits, expected
        )


def test_a_forward_that_raised_routes_no_later_one() -> None:
    model, processor, _ = routed_llava()
    batch = processor(text=[prompt(QUESTIONS[0])], images=[image(0)], return_tensors="pt")
    embeds = model.get_input_embeddings()(batch["input_ids"])
    with pytest.raises(ValueError, match="Input image size"), torch.no_grad():
        model(input_ids=batch["input_ids"], pixel_values=torch.zeros(1, 3, 1, 1))
    with pytest.raises(ValueError, match="must see input_ids"), torch.no_grad():
        model.model.language_model(inputs_embeds=embeds)


def test_positional_inputs_are_routed() -> None:
    model, processor, _ = routed_llava()
    batch = batch_of(processor, SAMPLES[:2])
    expected = model(**batch).logits
    arguments = (batch["input_ids"], batch["pixel_values"], batch["attention_mask"])
    assert torch.equal(model(*arguments).logits, expected)
    assert torch.equal(model.lm_head(model.model(*arguments).last_hidden_state), expected)


@AHEAD
def test_precomputed_image_features_are_routed_by_their_own_images() -> None:
    model, processor, cram = routed_llava()
    batch = batch_of(processor, SAMPLES[:1])
    expected = model(**batch).logits
    pixels = batch.pop("pixel_values")
    encoded = model.get_image_features(pixel_values=pixels, return_dict=True)
    model.get_image_features(pixel_values=pixels * 0.1, return_dict=True)
    assert torch.equal(model(**batch, mm_encoder_outputs={"image": encoded}).logits, expected)
    stranger = type(encoded)(pooler_output=encoded.pooler_output)
    with pytest.raises(ValueError, match="got image tokens without pixels"):
        model(**batch, mm_encoder_outputs={"image": stranger})


@pytest.mark.skipif(not AHEAD.args[0], reason="this transformers takes features that were computed ahead")
def test_features_that_the_model_would_ignore_are_refused() -> None:
    model, processor, _ = routed_llava()
    batch = batch_of(processor, SAMPLES[:1])
    encoded = model.get_image_features(pixel_values=batch.pop("pixel_values"), return_dict=True)
    with pytest.raises(ValueError, match="mm_encoder_outputs must be absent"):
        model(**batch, mm_encoder_outputs={"image": encoded})


def test_a_separate_encoder_reads_the_models_pixels() -> None:
    clip = factories.clip_model()
    model, processor = factories.llava(seed=3), factories.llava_processor()
    cram = attach(model, CramConfig(), factories.clip_encoder(model, clip), processor)
    assert not cram.encoder.reuses_vision_tower
    one_expert(cram)
    model(**batch_of(processor, SAMPLES))
    explicit = cram.encode([question for question, _ in SAMPLES], [pictures for _, pictures in SAMPLES])
    torch.testing.assert_close(cram.state.query.image, explicit.image, atol=1e-4, rtol=1e-4)
    assert torch.equal(cram.state.query.has_image, explicit.has_image)


def test_image_tokens_that_do_not_fit_the_images_are_refused() -> None:
    _, processor, cram = routed_llava()
    reader, ids = cram.hooks._reader, batch_of(processor, [SAMPLES[0], SAMPLES[3]])["input_ids"]
    call = Call(ids, None, Images(Pixels(torch.ones(2, 3, 16, 16)), factories.TOKENS_PER_IMAGE))
    message = r"image tokens of 2 images or tiles, \[4, 4\], got \[4, 8\] in 2 rows"
    with pytest.raises(ValueError, match=message):
        reader.query(call)


def test_automatic_routing_without_a_tokenizer_says_what_is_missing(tmp_path: Path) -> None:
    clip = factories.clip_model()
    model = factories.llava(clip=clip)
    cram = attach(model, CramConfig(), factories.clip_encoder(model, clip))
    one_expert(cram)
    batch = batch_of(factories.llava_processor(), SAMPLES[:1])
    with pytest.raises(ValueError, match="processor must be given to attach"):
        model(**batch)
    factories.tokenizer().save_pretrained(tmp_path)
    saved = factories.llava(clip=clip)
    saved.name_or_path = str(tmp_path)
    cram = attach(saved, CramConfig(), factories.clip_encoder(saved, clip))
    one_expert(cram)
    saved(**batch)
    assert torch.equal(cram.state.query.text, cram.encoder.encode_text([QUESTIONS[0]]))


def test_models_from_disk(tmp_path: Path) -> None:
    factories.save_all(tmp_path)
    for name in factories.MODELS:
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / name)
        encoder = ClipEncoder.from_pretrained(str(tmp_path / "clip"), model)
        assert encoder.reuses_vision_tower == (name == "llava")
        cram = attach(model, CramConfig(), encoder)
        assert len(cram.modules) == 8
        one_expert(cram)
        batch = batch_of(AutoProcessor.from_pretrained(tmp_path / "llava"), SAMPLES[2:3])
        model(**batch)
        assert torch.equal(cram.state.query.text, cram.encoder.encode_text([prompt_text(name)]))


def prompt_text(name: str) -> str:
    """What the text query of a LLaVA prompt is: families of other markers take the whole prompt."""
    return QUESTIONS[0] if name == "llava" else prompt(QUESTIONS[0], 0)


def one_expert(cram: AttachedModel) -> None:
    query = cram.encode([QUESTIONS[0]], [[image(0)]])
    cram.method.router.groups.observe("task", query.text)
    cram.method.add_expert("one", factories.expert_weights(cram, 0), 0, query.image[0], trained=False)


def test_features_that_are_not_finite_are_one_clear_error() -> None:
    model, processor, _ = routed_llava()
    batch = batch_of(processor, SAMPLES[:1])
    batch["pixel_values"][0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="image features must be finite, got NaN or Inf"):
        model(**batch)


def test_released_code_routes_on_the_batch_mean() -> None:
    model, processor, cram = routed_llava(released_code=True)
    model(**batch_of(processor, SAMPLES[:2]))
    gates = cram.state.route.gates
    assert torch.equal(gates[:, 0], gates[:, 1])


def _replaced_linear(model: Any) -> str:
    attention = model.model.language_model.layers[1].self_attn
    attention.v_proj = attention.v_proj.base
    return "model.language_model.layers.1.self_attn.v_proj"


def _replaced_attention(model: Any) -> str:
    layer = model.model.language_model.layers[0]
    layer.self_attn = copy.deepcopy(layer.self_attn)
    return "model.language_model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("replace", [_replaced_linear, _replaced_attention])
@pytest.mark.parametrize("trained", [False, True])
def test_a_replaced_linear_is_not_left_out_silently(replace: Callable[[Any], str], trained: bool) -> None:
    model, processor, cram = routed_llava(trained=trained)
    batch = batch_of(processor, SAMPLES)
    path = replace(model)
    with pytest.raises(ValueError, match=f"adapted linears must stay in the model, got .* {path}") as refused:
        model(**batch)
    # An attention block holds four of them.
    assert (" and others;" in str(refused.value)) == (replace is _replaced_attention)
    with cram.disabled():
        if replace is _replaced_linear:
            model(**batch)
            return
        with pytest.raises(ValueError, match="experts without gates, as in a copy of a part of a model"):
            model(**batch)


def test_a_wrapped_layer_and_an_exchanged_base_stay() -> None:
    model, processor, _ = routed_llava()
    batch = batch_of(processor, SAMPLES)
    before = model(**batch).logits
    attention = model.model.language_model.layers[0].self_attn
    base = attention.q_proj.base
    attention.q_proj.base = torch.nn.Linear(base.in_features, base.out_features, bias=False)
    attention.q_proj.base.weight = base.weight
    attention.o_proj = torch.nn.Sequential(attention.o_proj)
    assert torch.equal(model(**batch).logits, before)
