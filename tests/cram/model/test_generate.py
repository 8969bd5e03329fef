"""Generation: rows expanded by beams and returned sequences, gates fixed at prefill, caches with their
gates."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cram.attach import detach
from cram.model.cache import made_cache
from cram.routing.query import Query
from tests.cram.factories import QUESTIONS, continuing, image, prompt, routed_llava

SAMPLES: list[tuple[str, list[Any]]] = [
    (QUESTIONS[0], [image(0)]),
    (QUESTIONS[1], [image(1), image(3)]),
    (QUESTIONS[2], []),
]
SETTINGS: list[dict[str, Any]] = [
    {"num_beams": 3, "num_return_sequences": 2},
    {"num_beams": 1},
]


def batch_of(processor: Any, samples: list[tuple[str, list[Any]]]) -> Any:
    images = [picture for _, pictures in samples for picture in pictures]
    texts = [prompt(question, len(pictures)) for question, pictures in samples]
    return processor(text=texts, images=images or None, padding=True, return_tensors="pt")


def answers(model: Any, batch: Any, **settings: Any) -> list[list[int]]:
    made = model.generate(**batch, max_new_tokens=6, min_new_tokens=6, do_sample=False, **settings)
    return made[:, batch["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_mixed_batch_generates_what_its_rows_generate(settings: dict[str, Any]) -> None:
    model, processor, cram = routed_llava()
    together = answers(model, batch_of(processor, SAMPLES), **settings)
    assert set(cram.state.route.groups.tolist()) == {0, 1}
    alone = [row for sample in SAMPLES for row in answers(model, batch_of(processor, [sample]), **settings)]
    assert together == alone
    with cram.disabled():
        assert answers(model, batch_of(processor, SAMPLES), **settings) != together


@pytest.mark.parametrize("settings", SETTINGS)
def test_explicit_routes_generate_the_same(settings: dict[str, Any]) -> None:
    model, processor, cram = routed_llava()
    expected = answers(model, batch_of(processor, SAMPLES), **settings)
    query = cram.encode([question for question, _ in SAMPLES], [pictures for _, pictures in SAMPLES])
    with cram.fixed(cram.route(query)):
        assert answers(model, batch_of(processor, SAMPLES), **settings) == expected


def test_gates_are_computed_once_at_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor, cram = routed_llava()
    queries: list[Query] = []
    cram.hooks.on_query.append(queries.append)
    routes: list[Query] = []
    route = cram.method.router.route
    monkeypatch.setattr(
        cram.method.router, "route", lambda query, group: routes.append(query) or route(query, group)
    )
    answers(model, batch_of(processor, SAMPLES), num_beams=3)
    assert len(queries) == len(routes) == 1
    # Before 5.18 transformers repeats the rows of a prompt for its beams and only then reads it.
    assert len(queries[0]) in (len(SAMPLES), 3 * len(SAMPLES))


def test_decoding_equals_one_forward_over_the_whole_sequence() -> None:
    model, processor, _ = routed_llava()
    batch = batch_of(processor, SAMPLES[:1])
    made = model.generate(
        **batch, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    whole = model(input_ids=made.sequences, pixel_values=batch["pixel_values"]).logits
    decoded = torch.stack(made.logits, dim=1)
    torch.testing.assert_close(whole[:, -6:-1], decoded, atol=1e-5, rtol=1e-5)


def test_interleaved_caches_keep_their_own_gates() -> None:
    model, processor, cram = routed_llava()
    token = torch.tensor([[40]])
    expected = []
    for sample in SAMPLES[:2]:
        cache = made_cache(model(**batch_of(processor, [sample]), use_cache=True))
        expected.append(model(input_ids=token, **continuing(model, cache)).logits)
    caches = [made_cache(model(**batch_of(processor, [s]), use_cache=True)) for s in SAMPLES[:2]]
    for cache, logits in zip(caches, expected, strict=True):
        assert torch.equal(model(input_ids=token, **continuing(model, cache)).logits, logits)
    assert not torch.allclose(*expected)


def test_a_cache_of_unknown_origin_is_an_error() -> None:
    model, processor, cram = routed_llava()
    with cram.disabled():
        cache = made_cache(model(**batch_of(processor, SAMPLES[:1]), use_cache=True))
    with pytest.raises(ValueError, match="must come from a routed prefill"):
        model(input_ids=torch.tensor([[40]]), **continuing(model, cache))


def test_images_behind_a_cache_are_an_error() -> None:
    model, processor, cram = routed_llava()
    batch = batch_of(processor, SAMPLES[:1])
    cache = made_cache(model(**batch, use_cache=True))
    with pytest.raises(ValueError, match="images must all be in the prefill"):
        model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"], **continuing(model, cache))


def test_generation_returns_to_the_base_model_when_disabled() -> None:
    model, processor, cram = routed_llava()
    with cram.disabled():
        off = answers(model, batch_of(processor, SAMPLES), num_beams=3)
    detach(model)
    assert answers(model, batch_of(processor, SAMPLES), num_beams=3) == off


def test_guidance_by_a_prompt_of_another_route_is_refused() -> None:
    """The prompt without a condition is the last token alone, which asks for whatever experts."""
    model, processor, cram = routed_llava()
    batch = processor(text=[prompt(QUESTIONS[0])], images=[image(0)], return_tensors="pt")
    options: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    expected = model.generate(**batch, **options)
    with pytest.raises(
        ValueError, match="all prompts of one generation must have one route, .*guidance_scale"
    ):
        model.generate(**batch, **options, guidance_scale=1.5)
    with cram.fixed(cram.state.route):
        assert model.generate(**batch, **options, guidance_scale=1.5).shape == expected.shape
    assert torch.equal(model.generate(**batch, **options), expected)
