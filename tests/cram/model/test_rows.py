"""Rows of a KV cache keep the routes of their prompts, and are refused at the places of others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from cram.model.cache import made_cache
from cram.model.rows import _exchangeable, marks_of
from cram.model.state import ForwardState
from cram.routing.query import Query, Route
from tests.cram.factories import QUESTIONS, continuing, image, prompt, routed_llava

WINDOW = 16  # far shorter than the prompts
SLIDING = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": WINDOW}
TEXTS: dict[str, dict[str, Any]] = {
    "full": {},
    "mistral": {"model_type": "mistral", "sliding_window": WINDOW},
    "qwen2": {**SLIDING, "max_window_layers": 0},
    "full_then_sliding": {**SLIDING, "max_window_layers": 1},
    "sliding_then_full": {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]},
}
REFUSED = "must stay at their places, .* got a reordered cache"


def batch_of(processor: Any, *numbers: int) -> Any:
    texts = [prompt(QUESTIONS[number]) for number in numbers]
    pictures = [image(number) for number in numbers]
    return processor(text=texts, images=pictures, padding=True, return_tensors="pt")


class Decoding:
    """A greedy generation of two prompts of different routes, one forward at a time."""

    def __init__(self, text: str = "full", static: bool = False) -> None:
        self.model, processor, self.cram = routed_llava(text=TEXTS[text])
        batch = batch_of(processor, 0, 1)
        given = {}
        if static:
            config = self.model.config.get_text_config()
            given = continuing(self.model, StaticCache(config=config, max_cache_len=128))
        with torch.no_grad():
            made = self.model(**batch, **given, use_cache=True)
        self.ids, self.mask = batch["input_ids"], batch["attention_mask"]
        self.cache, self.token = made_cache(made), made.logits[:, -1:].argmax(-1)

    def step(self, order: Any = slice(None)) -> Tensor:
        """The logits of one decode step, with the rows of its inputs in an order."""
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
        inputs = {"input_ids": self.token[order], "attention_mask": self.mask[order]}
        with torch.no_grad():
            logits: Tensor = self.model(**inputs, **continuing(self.model, self.cache)).logits
        self.token = logits[:, -1:].argmax(-1)
        return logits


@pytest.mark.parametrize("steps", [0, 2, WINDOW + 2])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("text", TEXTS)
def test_rows_that_changed_their_places_are_refused(text: str, static: bool, steps: int) -> None:
    decoding = Decoding(text, static)
    for _ in range(steps):
        decoding.step()
    decoding.cache.reorder_cache(torch.tensor([1, 0]))
    with pytest.raises(ValueError, match=REFUSED):
        decoding.step([1, 0])


@pytest.mark.parametrize("order", [[1, 0], [1, 1]])
def test_selected_rows_must_be_those_of_their_prompts(order: list[int]) -> None:
    decoding = Decoding()
    decoding.cache.batch_select_indices(torch.tensor(order))
    with pytest.raises(ValueError, match=REFUSED):
        decoding.step(order)


def test_rows_of_a_cache_that_is_cut_short_are_known_too() -> None:
    """Also where tokens of the prompt itself were taken out."""
    decoding = Decoding()
    decoding.cache.crop(-2)
    decoding.cache.reorder_cache(torch.tensor([1, 0]))
    again = {"input_ids": decoding.ids.flip(0)[:, -2:], "attention_mask": decoding.mask.flip(0)}
    with torch.no_grad(), pytest.raises(ValueError, match=REFUSED):
        decoding.model(**again, **continuing(decoding.model, decoding.cache))


@pytest.mark.parametrize("text", TEXTS)
def test_rows_that_stay_with_their_prompt_go_on(text: str) -> None:
    expected = Decoding(text).step()
    decoding = Decoding(text)
    decoding.cache.reorder_cache(torch.tensor([0, 1]))
    decoding.cache.batch_repeat_interleave(2)
    rows = [0, 0, 1, 1]
    torch.testing.assert_close(decoding.step(rows), expected[rows], atol=1e-5, rtol=1e-5)
    decoding.mask = decoding.mask[rows]
    decoding.cache.reorder_cache(torch.tensor([1, 0, 3, 2]))
    decoding.step()
    decoding.cache.reorder_cache(torch.tensor([2, 3, 0, 1]))
    with pytest.raises(ValueError, match=REFUSED):
        decoding.step()


def test_rows_of_one_route_may_change_their_places() -> None:
    """Under a route that the caller gives, rows with equal gates are alike."""
    for gates, refused in (([[1.0, 0, 0], [1.0, 0, 0]], False), ([[1.0, 0, 0], [0, 1.0, 0]], True)):
        model, processor, cram = routed_llava()
        batch = batch_of(processor, 0, 1)
        with torch.no_grad(), cram.fixed(torch.tensor(gates)):
            made = model(**batch, use_cache=True)
        cache = made_cache(made)
        cache.reorder_cache(torch.tensor([1, 0]))
        mask = torch.cat([batch["attention_mask"].flip(0), torch.ones(2, 1, dtype=torch.long)], 1)
        inputs = {"input_ids": made.logits[:, -1:].argmax(-1).flip(0), "attention_mask": mask}
        with torch.no_grad():
            if refused:
                with pytest.raises(ValueError, match=REFUSED):
                    model(**inputs, **continuing(model, cache))
            else:
                model(**inputs, **continuing(model, cache))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("images", [0, 1])
def test_beams_of_one_prompt_change_their_places_freely(text: str, images: int) -> None:
    model, processor, _ = routed_llava(text=TEXTS[text])
    options = {"num_beams": 3, "min_new_tokens": 6, "max_new_tokens": 6, "do_sample": False}
    if images:
        alone, both = [batch_of(processor, number) for number in (0, 1)], batch_of(processor, 0, 1)
    else:
        texts = [prompt(QUESTIONS[number], images=0) for number in (0, 1)]
        alone = [processor(text=each, return_tensors="pt") for each in texts]
        both = processor(text=texts, padding=True, return_tensors="pt")
    expected = [model.generate(**each, **options)[0, -6:] for each in alone]
    assert torch.equal(model.generate(**both, **options)[:, -6:], torch.stack(expected))


@pytest.mark.parametrize("text", TEXTS)
def test_static_caches_of_every_kind_take_the_routes_of_whole_prompts(text: str) -> None:
    """The mask of a sliding layer lets the last token see its window alone."""
    model, processor, cram = routed_llava(text=TEXTS[text])
    batch = batch_of(processor, 0, 1)
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    expected, gates = model.generate(**batch, **options), cram.state.route.gates
    found = model.generate(**batch, **options, cache_implementation="static", disable_compile=True)
    assert torch.equal(found, expected) and torch.equal(cram.state.route.gates, gates)


def two_rows(keys: Tensor) -> Any:
    """A cache of one layer that holds keys [2, T, D]."""
    cache = DynamicCache()
    cache.update(keys[:, None], keys[:, None], 0)
    return cache


def test_one_token_that_is_left_tells_the_rows() -> None:
    cache = two_rows(torch.randn(2, 40, 8))
    marks = marks_of(cache, Decoding().cram.state)
    assert marks is not None
    cache.crop(-39)
    assert not marks.have_moved(cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert marks.have_moved(cache)


@pytest.mark.parametrize("held", [1, 2, 16, 31])
def test_every_token_of_a_short_cache_is_marked(held: int) -> None:
    state = Decoding().cram.state
    for place in range(held):
        keys = torch.zeros(2, held, 8)
        keys[1, place] = 1
        cache = two_rows(keys)
        marks = marks_of(cache, state)
        assert marks is not None
        cache.reorder_cache(torch.tensor([1, 0]))
        assert marks.have_moved(cache)


@pytest.mark.parametrize(
    ("samples", "experts", "memory", "differs"),
    [
        (1, 3, {}, False),
        (1, 1, {}, False),
        (2, 1, {}, True),
        (2, 3, {}, True),
        (1, 1, {"made": torch.ones(2)}, True),
    ],
)
def test_rows_differ_where_samples_have_gates_or_memory_of_their_own(
    samples: int, experts: int, memory: dict[str, Tensor], differs: bool
) -> None:
    state = ForwardState(Route(torch.ones(4, samples, experts), memory=memory))
    assert state.differs_by_row is differs
    assert ForwardState().differs_by_row is False


def test_rows_of_equal_gates_and_another_query_are_not_exchangeable() -> None:
    """What is asked behind a cache is routed by the query of its row."""
    text, image = torch.eye(3, 4), torch.ones(3, 4)
    text[2] = text[1]
    query = Query(text, image, torch.ones(3, dtype=torch.bool))
    for given, expected in ((None, [[True] * 3] * 3), (query, [[True, False, False], [False, True, True]])):
        state = ForwardState(Route(torch.ones(2, 3, 2) / 2), query=given)
        assert _exchangeable(state, 3)[: len(expected)].tolist() == expected
