"""KV caches: static ones are continued without reading their device, and a cache that was reset is not."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import StaticCache

from cram.model.cache import CACHE_NAMES, _Kept, given_cache, made_cache
from cram.model.state import ForwardState
from tests.cram.factories import QUESTIONS, continuing, image, prompt, routed_llava

TOKEN = torch.tensor([[40]])
PLACE = torch.tensor([[70]])


READS = {"__bool__", "__int__", "__float__", "__index__", "item", "tolist", "cpu", "nonzero"}


class HostReads(TorchFunctionMode):
    """Counts how often Python reads a tensor's value; on a GPU each time synchronises."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(func, "__name__", "") in READS
        return func(*args, **(kwargs or {}))


def batch_of(processor: Any, *numbers: int) -> Any:
    texts = [prompt(QUESTIONS[number]) for number in numbers]
    pictures = [image(number) for number in numbers]
    return processor(text=texts, images=pictures, padding=True, return_tensors="pt")


def static(model: Any) -> StaticCache:
    return StaticCache(config=model.config.get_text_config(), max_cache_len=128)


def step(model: Any, cache: Any) -> int:
    """Reads on the host of one decode step."""
    with HostReads() as reads:
        model(input_ids=TOKEN, position_ids=PLACE, **continuing(model, cache))
    return reads.count


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_either_name_is_read(name: str) -> None:
    cache = object()
    other = next(each for each in CACHE_NAMES if each != name)
    assert given_cache({name: cache, other: None}) is made_cache(SimpleNamespace(**{name: cache})) is cache
    assert given_cache({}) is made_cache(SimpleNamespace()) is None


def test_a_copy_of_a_cache_has_no_state() -> None:
    """A copy is continued on its own; its state is looked up as that of any cache of its making."""
    kept = _Kept(state=ForwardState())
    for copied in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        assert type(copied) is _Kept and copied.state is None
    assert kept.state is not None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_static_caches_generate_what_dynamic_ones_generate(mode: Any) -> None:
    model, processor, cram = routed_llava()
    settings: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with mode():
        for numbers in ((0, 1), (1, 0)):  # generation resets the first cache and uses it again
            batch = batch_of(processor, *numbers)
            expected = model.generate(**batch, **settings)
            found = model.generate(**batch, **settings, cache_implementation="static", disable_compile=True)
            assert torch.equal(found, expected)
            assert cram.state.route.groups.tolist() == list(numbers)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_decode_steps_behind_a_static_cache_read_nothing_on_the_host(mode: Any) -> None:
    model, processor, cram = routed_llava()
    with mode():
        cache = static(model)
        model(**batch_of(processor, 0), **continuing(model, cache), use_cache=True)
        route = cram.state.route
        assert step(model, cache) == step(model, cache) == 0
        assert cram.state.route is route and cram.state.decoding
        with HostReads() as reads:
            int(cache.get_seq_length())
        assert reads.count == 1
        with cram.disabled():
            assert step(model, cache) == step(model, cache) == 0


def test_graphs_and_eager_steps_read_one_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both write to it how far the question has come."""
    model, processor, cram = routed_llava()
    with torch.no_grad():
        cache = static(model)
        model(**batch_of(processor, 0), **continuing(model, cache), use_cache=True)
        step(model, cache)
    eager = cram.hooks._caches.get(cache)
    assert eager is not None and eager.prompt is not None and eager.calls
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert cram.hooks._caches.get(cache) is eager


def test_one_token_in_a_static_cache_that_was_reset_is_a_prompt() -> None:
    model, processor, cram = routed_llava()
    with torch.no_grad():
        cache = static(model)
        model(**batch_of(processor, 0), **continuing(model, cache), use_cache=True)
        route = cram.state.route
        cache.reset()
        with pytest.raises(ValueError, match="must be in one prefill, got its first token alone"):
            model(input_ids=TOKEN, **continuing(model, cache))
        with cram.fixed(route):
            model(input_ids=TOKEN, **continuing(model, cache))
            assert not cram.state.decoding
            assert step(model, cache) == 0 and cram.state.decoding


def test_padding_is_known_behind_the_mask_of_a_static_cache() -> None:
    model, processor, cram = routed_llava()
    batch = batch_of(processor, 0, 2)
    assert not batch["attention_mask"].all()
    made = model.prepare_inputs_for_generation(
        **batch, **continuing(model, static(model)), is_first_iteration=True
    )
    assert made["attention_mask"].dim() == 4
    model(**made)
    assert torch.equal(cram.state.mask, batch["attention_mask"].bool())
